"""Tokens hidden for a model to guess (Devlin et al. 2018, "BERT", arXiv:1810.04805, section 3.1, task 1).

Of the tokens, `rate` are chosen; of these, 80 % become the mask, 10 % a random token, and 10 % stay. The choice depends on
(seed, epoch, index), so that each pass over the data hides others, whatever the number of workers and processes.
"""

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.data.windows import IGNORED
from tameformer.errors import DataError
from tameformer.shapes import Int64, Integer

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that are masked, and replaced by random ones."""


class MaskedWindows:
    """Windows of one length over a long row of tokens, each after the begin token, with some tokens hidden.

    Example:
        >>> source = MaskedWindows(np.arange(10, 40), 8, vocab_size=50, begin_id=1, mask_id=3, num_special=4)
        >>> batch = source.fetch(SampleKeys(0, 0, np.array([0, 3])))
        >>> len(source), batch["tokens"].shape, batch["tokens"][:, 0].tolist()
        (4, torch.Size([2, 8]), [1, 1])
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " tokens"],
        length: int,
        *,
        vocab_size: int,
        begin_id: int,
        mask_id: int,
        num_special: int,
        rate: float = 0.15,
    ):
        """Windows that do not overlap; a rest that is too short is left out.

        Args:
            tokens: All texts, one after the other.
            length: Of a window, begin token included.
            vocab_size: Random tokens are below this.
            begin_id: Stands in front of each window; never hidden.
            mask_id: Stands in the place of most hidden tokens.
            num_special: Ids below this are special: not hidden, and never random tokens.
            rate: Share of the tokens that is hidden.

        Raises:
            DataError: The tokens do not fill one window.
            ValueError: `rate` is out of range, or `length` below 2.
        """
        if not 0 < rate < 1 or length < 2:
            raise ValueError(f"expected a rate between 0 and 1 and a length of at least 2, got {rate} and {length}")
        count = len(tokens) // (length - 1)
        if count == 0:
            raise DataError(f"{len(tokens)} tokens do not fill a window of {length}; give more text or shorter windows")
        self._windows = tokens[: count * (length - 1)].reshape(count, length - 1).astype(np.int32)
        self.vocab_size, self.begin_id, self.mask_id, self.num_special = vocab_size, begin_id, mask_id, num_special
        self.rate = rate

    def __len__(self) -> int:
        return len(self._windows)

    def fetch(self, keys: SampleKeys) -> dict[str, Tensor | int]:
        """`tokens` and `targets` (batch, length), targets -100 where nothing was chosen, and `num_items`, how many were."""
        real = self._windows[keys.indices].astype(np.int64)
        hidden, chosen = hide(
            real,
            *(uniforms(keys, real.shape[1], salt) for salt in ("mask choice", "mask action", "mask token")),
            mask_id=self.mask_id,
            num_special=self.num_special,
            vocab_size=self.vocab_size,
            rate=self.rate,
        )
        first = np.full((len(real), 1), self.begin_id)
        targets = np.where(chosen, real, IGNORED)
        return {
            "tokens": torch.from_numpy(np.concatenate([first, hidden], axis=1)),
            "targets": torch.from_numpy(np.concatenate([np.full_like(first, IGNORED), targets], axis=1)),
            "num_items": int(chosen.sum()),
        }


def hide(
    tokens: Int64[np.ndarray, "batch seq"],
    choice: np.ndarray,
    action: np.ndarray,
    token: np.ndarray,
    *,
    mask_id: int,
    num_special: int,
    vocab_size: int,
    rate: float,
) -> tuple[Int64[np.ndarray, "batch seq"], np.ndarray]:
    """The tokens with some hidden, and where; from three uniform numbers in [0, 1) a token.

    At least one token of each row is chosen where it has one that may be, so that no row is without a target.
    """
    may = tokens >= num_special
    choice = np.where(may, choice, 2.0)
    least = choice == choice.min(axis=1, keepdims=True)
    chosen = may & ((choice < rate) | least)
    others = num_special + (token * (vocab_size - num_special)).astype(np.int64)
    hidden = np.where(chosen & (action < MASKED), mask_id, tokens)
    return np.where(chosen & (action >= MASKED) & (action < MASKED + RANDOM), others, hidden), chosen
