"""Formal languages that tell architectures apart: members drawn uniformly, and what may follow each of their prefixes.

Bhattamishra et al. 2020, "On the Ability and Limitations of Transformers to Recognize Formal Languages", arXiv:2009.11264;
Dyck-(k, D): Hewitt et al. 2020, arXiv:2010.07515, and Yao et al. 2021, arXiv:2105.11115.

Strings of a batch are drawn together, from uniform numbers of their own, so that a string is a function of its sample alone.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from tameformer.shapes import Bool, Float, Int64

Lengths = Int64[np.ndarray, " batch"]
Strings = Int64[np.ndarray, "batch seq"]
"""Numbers of symbols; what stands behind a string's length means nothing."""
Follow = Bool[np.ndarray, "batch prefixes choices"]
"""What may follow each prefix, the empty one first: each symbol, and at last the end of the string."""


@runtime_checkable
class Language(Protocol):
    """A formal language; `draws` uniform numbers in [0, 1) a symbol are what a string is drawn with."""

    draws: int

    @property
    def symbols(self) -> tuple[str, ...]:
        """The alphabet."""
        ...

    def lengths(self, shortest: int, longest: int) -> Int64[np.ndarray, " lengths"]:
        """The lengths in this range that members have."""
        ...

    def draw(self, lengths: Lengths, u: Float[np.ndarray, "batch numbers"]) -> Strings:
        """A member of each length, all members of a length equally likely."""
        ...

    def follow(self, strings: Strings) -> Follow:
        """What may follow each prefix of a member."""
        ...


@dataclass(frozen=True)
class Parity:
    """Strings of 0 and 1 with an even number of ones: one bit of memory, changed by a symbol anywhere in the string.

    Example:
        >>> Parity().follow(np.array([[1, 1]]))[0, :, 2].tolist()  # may end: nothing, 1, 11
        [True, False, True]
    """

    draws = 1
    symbols = ("0", "1")

    def lengths(self, shortest: int, longest: int) -> Int64[np.ndarray, " lengths"]:
        """All of them."""
        return np.arange(shortest, longest + 1)

    def draw(self, lengths: Lengths, u: Float[np.ndarray, "batch numbers"]) -> Strings:
        """Fair bits, and a last one that makes their number even."""
        places = np.arange(lengths.max())
        strings = (u[:, : lengths.max()] < 0.5) & (places < lengths[:, None] - 1)
        np.put_along_axis(strings, lengths[:, None] - 1, strings.sum(1, keepdims=True) % 2 == 1, axis=1)
        return strings.astype(np.int64)

    def follow(self, strings: Strings) -> Follow:
        """Both symbols always; the end after an even number of ones."""
        ones = np.pad(strings.cumsum(1), ((0, 0), (1, 0)))
        always = np.ones_like(ones, dtype=bool)
        return np.stack([always, always, ones % 2 == 0], axis=-1)


@dataclass(frozen=True)
class EvenLength:
    """(aa)*: counting modulo two where there is nothing but the count."""

    draws = 1
    symbols = ("a",)

    def lengths(self, shortest: int, longest: int) -> Int64[np.ndarray, " lengths"]:
        """The even ones."""
        return np.arange(shortest + shortest % 2, longest + 1, 2)

    def draw(self, lengths: Lengths, u: Float[np.ndarray, "batch numbers"]) -> Strings:
        """The one member of each length."""
        return np.zeros((len(lengths), lengths.max()), dtype=np.int64)

    def follow(self, strings: Strings) -> Follow:
        """The symbol always; the end after an even number of them."""
        even = np.broadcast_to(np.arange(strings.shape[1] + 1) % 2 == 0, (len(strings), strings.shape[1] + 1))
        return np.stack([np.ones_like(even), even], axis=-1)


@dataclass(frozen=True)
class Dyck:
    """Balanced brackets of `num_types` types, nested at most `max_depth` deep: Dyck-1, Dyck-k and Dyck-(k, D).

    Example:
        >>> Dyck(num_types=2).symbols
        ('(0', '(1', ')0', ')1')
    """

    num_types: int = 1
    max_depth: int | None = None
    draws = 2

    def __post_init__(self) -> None:
        for name in ("num_types", "max_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def symbols(self) -> tuple[str, ...]:
        """Opening brackets, then closing ones, by type."""
        return tuple(f"{side}{kind}" for side in "()" for kind in range(self.num_types))

    def lengths(self, shortest: int, longest: int) -> Int64[np.ndarray, " lengths"]:
        """The even ones."""
        return np.arange(shortest + shortest % 2, longest + 1, 2)

    def draw(self, lengths: Lengths, u: Float[np.ndarray, "batch numbers"]) -> Strings:
        """Symbol by symbol, each as likely as the share of the members that go on with it."""
        longest = int(lengths.max())
        opens = self._open_probabilities(longest)
        rows, depth = np.arange(len(lengths)), np.zeros(len(lengths), dtype=np.int64)
        stack = np.zeros((len(lengths), longest + 1), dtype=np.int64)
        strings = np.zeros((len(lengths), longest), dtype=np.int64)
        for place in range(longest):
            is_open = u[:, 2 * place] < opens[np.maximum(lengths - place, 0), depth]
            kind = (u[:, 2 * place + 1] * self.num_types).astype(np.int64)
            closing = stack[rows, np.maximum(depth - 1, 0)] + self.num_types
            strings[:, place] = np.where(is_open, kind, closing)
            stack[rows[is_open], depth[is_open]] = kind[is_open]
            # Behind the end of a string nothing counts; its depth stays 0.
            depth = np.where(place < lengths, depth + np.where(is_open, 1, -1), depth)
        return strings

    def follow(self, strings: Strings) -> Follow:
        """Opening brackets up to the depth, the closing one of the innermost type, the end where all are closed."""
        batch, longest = strings.shape
        rows, depth = np.arange(batch), np.zeros(batch, dtype=np.int64)
        stack = np.zeros((batch, longest + 1), dtype=np.int64)
        follow = np.zeros((batch, longest + 1, 2 * self.num_types + 1), dtype=bool)
        for place in range(longest + 1):
            may_open = np.ones(batch, dtype=bool) if self.max_depth is None else depth < self.max_depth
            follow[:, place, : self.num_types] = may_open[:, None]
            inside = rows[depth > 0]
            follow[inside, place, self.num_types + stack[inside, depth[inside] - 1]] = True
            follow[:, place, -1] = depth == 0
            if place < longest:
                is_open = strings[:, place] < self.num_types
                stack[rows[is_open], depth[is_open]] = strings[is_open, place]
                depth = np.maximum(depth + np.where(is_open, 1, -1), 0)  # behind the end it may be anything
        return follow

    def _open_probabilities(self, longest: int) -> Float[np.ndarray, "remaining depth"]:
        """Share of the ways to close `depth` brackets in `remaining` symbols that begin by opening one more."""
        bound = longest if self.max_depth is None else min(self.max_depth, longest)
        ways, opens = np.zeros(longest + 3), np.zeros((longest + 1, longest + 2))
        ways[0] = 1.0
        for remaining in range(1, longest + 1):
            up = np.append(ways[1:], 0.0)
            up[bound:] = 0.0
            down = np.append(0.0, ways[:-1])
            ways = (up + down) / 2  # the type of a bracket is drawn apart, and half the count keeps numbers in range
            with np.errstate(invalid="ignore"):
                opens[remaining] = np.nan_to_num(up / (2 * ways))[: longest + 2]
        return opens
