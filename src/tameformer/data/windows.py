"""One long stream of tokens as fixed windows: cut differently in every epoch to train, scored whole to evaluate.

Differs from drawing windows at random places, the usual way for small character models: here an epoch shows every token
once (but for fewer than two windows at the ends), so nothing is left out or seen twice by chance.
"""

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.errors import DataError
from tameformer.shapes import Integer

IGNORED = -100


class TokenWindows:
    """Training windows; window i of an epoch begins at phase(seed, epoch) + i * context.

    Example:
        >>> batch = TokenWindows(np.arange(100), context=8).fetch(SampleKeys(0, 0, np.array([3, 0])))
        >>> batch["tokens"].shape, batch["num_items"], bool((batch["targets"] == batch["tokens"] + 1).all())
        (torch.Size([2, 8]), 16, True)
    """

    def __init__(
        self, tokens: Integer[np.ndarray, " tokens"] | Integer[Tensor, " tokens"], context: int, *, salt: str = "window"
    ):
        """Windows over a stream.

        Args:
            tokens: The stream; kept as it is, so a small dtype or a memory map stays small.
            context: Tokens in a window.
            salt: Distinguishes several streams that share a data seed.

        Raises:
            DataError: The stream is shorter than two windows, which every phase must leave room for.
        """
        self._tokens = _checked_stream(tokens, context)
        self.context = context
        self._salt = salt
        self._offsets = np.arange(context + 1)
        self._phase: tuple[tuple[int, int], int] | None = None  # of the (seed, epoch) asked for last
        if len(self._tokens) < 2 * context:
            raise DataError(
                f"the training text has {len(self._tokens)} tokens, expected at least {2 * context} "
                f"(two windows of context {context}): give more text or a shorter context"
            )

    def __len__(self) -> int:
        """Windows in an epoch, the same in every epoch."""
        return (len(self._tokens) - self.context) // self.context

    def phase(self, seed: int, epoch: int) -> int:
        """Where the first window of an epoch begins, uniform in [0, context)."""
        if self._phase is None or self._phase[0] != (seed, epoch):
            draw = uniforms(SampleKeys(seed, epoch, np.zeros(1, dtype=np.int64)), 1, self._salt)
            self._phase = (seed, epoch), int(draw[0, 0] * self.context)
        return self._phase[1]

    def fetch(self, keys: SampleKeys) -> dict[str, Tensor | int]:
        """The windows of the keys: `tokens`, `targets` (the next tokens), both (batch, seq), and `num_items`."""
        begins = self.phase(keys.seed, keys.epoch) + keys.indices * self.context
        chunk = self._tokens.take(begins[:, None] + self._offsets)
        return {
            "tokens": torch.from_numpy(chunk[:, :-1].astype(np.int64)),
            "targets": torch.from_numpy(chunk[:, 1:].astype(np.int64)),
            "num_items": len(begins) * self.context,
        }


class EvaluationWindows:
    """Windows that together score every token of a stream but its first exactly once, the same in every epoch.

    With `stride` = context (the default) windows do not overlap. With a smaller one every window but the first repeats
    context - stride tokens for their context only (their targets are ignored): a truer loss at context / stride times
    the cost. The last window is padded with token 0 and ignored targets.
    """

    def __init__(
        self,
        tokens: Integer[np.ndarray, " tokens"] | Integer[Tensor, " tokens"],
        context: int,
        *,
        stride: int | None = None,
    ):
        """Windows over a stream.

        Args:
            tokens: The stream, at least two tokens.
            context: Tokens in a window.
            stride: Tokens from one window to the next, in [1, context]; None means context.

        Raises:
            DataError: Fewer than two tokens.
            ValueError: `stride` outside its range.
        """
        self._tokens = _checked_stream(tokens, context)
        self.context = context
        self.stride = context if stride is None else stride
        if not 1 <= self.stride <= context:
            raise ValueError(f"stride must be in [1, context] = [1, {context}], got {stride}")
        if len(self._tokens) < 2:
            raise DataError(f"the evaluation text has {len(self._tokens)} tokens, expected at least 2: give more text")

    @property
    def total_targets(self) -> int:
        """Targets that one pass scores."""
        return len(self._tokens) - 1

    def __len__(self) -> int:
        """Windows in the pass."""
        return 1 + -(-max(0, self.total_targets - self.context) // self.stride)

    def fetch(self, keys: SampleKeys) -> dict[str, Tensor | int]:
        """The windows of the keys: `tokens`, `targets` (-100 = not scored here), both (batch, seq), and `num_items`."""
        places = keys.indices[:, None] * self.stride + np.arange(self.context + 1)
        chunk = self._tokens[np.minimum(places, self.total_targets)].astype(np.int64)
        beyond = places > self.total_targets
        context_only = (keys.indices[:, None] > 0) & (np.arange(self.context) < self.context - self.stride)
        ignored = beyond[:, 1:] | context_only
        return {
            "tokens": torch.from_numpy(np.where(beyond[:, 1:], 0, chunk[:, :-1])),
            "targets": torch.from_numpy(np.where(ignored, IGNORED, chunk[:, 1:])),
            "num_items": int((~ignored).sum()),
        }


def _checked_stream(tokens: np.ndarray | Tensor, context: int) -> np.ndarray:
    """The stream as an array, if it and the context can be used at all."""
    stream = tokens.numpy() if isinstance(tokens, Tensor) else tokens
    if stream.ndim != 1 or not np.issubdtype(stream.dtype, np.integer):
        raise ValueError(f"tokens must be one row of integers, got {stream.dtype} of shape {stream.shape}")
    if context < 1:
        raise ValueError(f"context must be at least 1, got {context}")
    return stream
