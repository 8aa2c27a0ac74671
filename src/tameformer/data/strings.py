"""Strings of a formal language as batches: the next symbols after every prefix, or whether a string is a member."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from tameformer.data.formal import Language
from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.data.stream import Batch
from tameformer.errors import DataError

Question = Literal["next_symbols", "membership"]
UNASKED = -1
"""What stands in the targets where nothing is asked."""


@dataclass(frozen=True, eq=False)
class StringSource:
    """Strings made when they are asked for: each a function of (seed, epoch, index), lengths uniform over a range.

    A string is read behind a begin token, whose number is that of the end among the answers: `len(language.symbols)`.

    Raises:
        DataError: The language has no strings of these lengths.
    """

    language: Language
    """The language."""
    num_samples: int = field(kw_only=True)
    """Strings of an epoch."""
    min_length: int = field(kw_only=True)
    """Shortest string, in symbols."""
    max_length: int = field(kw_only=True)
    """Longest string, in symbols."""
    question: Question = field(kw_only=True, default="next_symbols")
    """Asks at every prefix of a member what may follow, or at the end of a string whether it may end there."""
    salt: str = field(kw_only=True, default="strings")
    """Name of the random numbers; another one gives other strings."""

    def __post_init__(self) -> None:
        if not len(self.lengths):
            raise DataError(
                f"no string of {type(self.language).__name__} has a length from {self.min_length} to {self.max_length}; "
                "widen the range"
            )

    @cached_property
    def lengths(self) -> np.ndarray:
        """The lengths that occur."""
        return self.language.lengths(self.min_length, self.max_length)

    def __len__(self) -> int:
        return self.num_samples

    def fetch(self, keys: SampleKeys) -> Batch:
        """The strings of the keys.

        `tokens` (batch, seq) with the begin token first, `targets` (batch, seq, choices) with 1 where a symbol, or at last
        the end, may follow, 0 where it may not and -1 where that is not asked; `lengths` (batch,), and `num_items`, the
        positions that are asked at.
        """
        longest = int(self.lengths[-1])
        u = uniforms(keys, 4 + longest * self.language.draws, self.salt)
        lengths = self.lengths[(u[:, 0] * len(self.lengths)).astype(np.int64)]
        strings = self.language.draw(lengths, u[:, 4:])
        begin, rows = len(self.language.symbols), np.arange(len(keys))
        if self.question == "membership":
            is_member = u[:, 1] < 0.5
            spoiled = self._spoil(strings, lengths, u[:, 2:4])
            strings = np.where(is_member[:, None], strings, spoiled)
            if begin == 1:  # the only symbol cannot be exchanged: one is missing
                lengths = lengths - ~is_member
            targets = np.full((len(keys), strings.shape[1] + 1, begin + 1), UNASKED, dtype=np.int64)
            targets[rows, lengths, -1] = is_member
        else:
            asked = np.arange(strings.shape[1] + 1) <= lengths[:, None]
            targets = np.where(asked[:, :, None], self.language.follow(strings).astype(np.int64), UNASKED)
        width = int(lengths.max())
        real = np.arange(width) < lengths[:, None]
        tokens = np.pad(np.where(real, strings[:, :width], 0), ((0, 0), (1, 0)), constant_values=begin)
        targets = targets[:, : width + 1]
        return {
            "tokens": torch.from_numpy(tokens),
            "targets": torch.from_numpy(targets),
            "lengths": torch.from_numpy(lengths),
            "num_items": int((targets != UNASKED).any(-1).sum()),
        }

    def _spoil(self, strings: np.ndarray, lengths: np.ndarray, u: np.ndarray) -> np.ndarray:
        """The strings with one symbol exchanged for another, which takes any of them out of any of these languages."""
        others = len(self.language.symbols) - 1
        if not others:
            return strings
        spoiled, rows = strings.copy(), np.arange(len(strings))
        places = (u[:, 0] * lengths).astype(np.int64)
        moved = 1 + (u[:, 1] * others).astype(np.int64)
        spoiled[rows, places] = (strings[rows, places] + moved) % (others + 1)
        return spoiled
