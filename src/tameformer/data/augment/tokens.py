"""Noise on token sequences: tokens replaced, deleted, or moved a little.

Replacing: Bowman et al. 2016, "Generating Sentences from a Continuous Space", arXiv:1511.06349, section 3.1. Deleting: Wei and
Zou 2019, "EDA", arXiv:1901.11196. Moving: Lample et al. 2017, "Unsupervised Machine Translation Using Monolingual Corpora
Only", arXiv:1711.00043, section 2.3.

Token i of a sample takes its own random number, a function of (seed, epoch, index, i): how far the batch is padded, and what
else is in it, changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.shapes import Bool, Float, Int

TokenBatch = tuple[Int[Tensor, "batch seq"], Int[Tensor, " batch"]]
"""Padded tokens, and how many of each row are real."""


@runtime_checkable
class TokenTransform(Protocol):
    """An augmentation of token sequences: a pure function of the tokens and of each sample's own numbers."""

    @property
    def salt(self) -> str:
        """Name of its random numbers, unique within a pipeline."""
        ...

    @property
    def protected(self) -> tuple[int, ...]:
        """Tokens that stay where and what they are, such as those for begin and end."""
        ...

    def apply(
        self,
        tokens: Int[Tensor, "batch seq"],
        free: Bool[Tensor, "batch seq"],
        u: Float[Tensor, "batch draws"],
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The changed tokens, and True where one stays. `free` is True at real tokens that are not protected.

        Column 0 of `u` is the sample's, column 1 + i that of its token i.
        """
        ...


def augment_tokens(
    tokens: Int[Tensor, "batch seq"],
    lengths: Int[Tensor, " batch"],
    keys: SampleKeys,
    transforms: Sequence[TokenTransform],
    *,
    padding_id: int,
) -> TokenBatch:
    """Apply the transforms in order, each with the samples' own random numbers; rows are moved together and padded anew.

    Raises:
        ValueError: two transforms have one salt, and would draw the same numbers.

    Example:
        >>> import numpy as np
        >>> tokens, lengths = torch.tensor([[5, 6, 7, 8], [9, 5, 0, 0]]), torch.tensor([4, 2])
        >>> keys = SampleKeys(0, 0, np.arange(2))
        >>> augment_tokens(tokens, lengths, keys, [TokenDropout(probability=1.0, replacement=3)], padding_id=0)[0].tolist()
        [[3, 3, 3, 3], [3, 3, 0, 0]]
    """
    salts = [transform.salt for transform in transforms]
    twice = sorted({salt for salt in salts if salts.count(salt) > 1})
    if twice:
        raise ValueError(f"each transform needs its own salt, got {twice} more than once; pass salt=... to one of them")
    for transform in transforms:
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        free = real & ~torch.isin(tokens, tokens.new_tensor(transform.protected))
        u = torch.from_numpy(uniforms(keys, 1 + tokens.shape[1], transform.salt))
        tokens, stays = transform.apply(tokens, free, u)
        stays = stays & real
        order = (~stays).to(torch.uint8).argsort(dim=1, stable=True)  # those that stay, in their order, come first
        lengths = stays.sum(1)
        tokens = tokens.gather(1, order).masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], padding_id)
    return tokens, lengths


@dataclass(frozen=True, kw_only=True)
class TokenDropout:
    """Put one token, such as that for unknown words or a mask, in the place of some."""

    replacement: int
    """What stands in for a dropped token."""
    probability: float = 0.1
    """Of dropping a token, 0..1."""
    protected: tuple[int, ...] = ()
    """Tokens that stay."""
    salt: str = "token dropout"
    """Name of its random numbers."""

    def __post_init__(self) -> None:
        _check(self.probability)

    def apply(
        self, tokens: Int[Tensor, "batch seq"], free: Bool[Tensor, "batch seq"], u: Float[Tensor, "batch draws"]
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The tokens, some of them replaced."""
        return tokens.masked_fill(free & (u[:, 1:] < self.probability), self.replacement), torch.ones_like(free)


@dataclass(frozen=True, kw_only=True)
class TokenDeletion:
    """Leave some tokens out; a sample that would lose all keeps the one that was least likely to go."""

    probability: float = 0.1
    """Of deleting a token, 0..1."""
    protected: tuple[int, ...] = ()
    """Tokens that stay."""
    salt: str = "token deletion"
    """Name of its random numbers."""

    def __post_init__(self) -> None:
        _check(self.probability)

    def apply(
        self, tokens: Int[Tensor, "batch seq"], free: Bool[Tensor, "batch seq"], u: Float[Tensor, "batch draws"]
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The tokens, and which of them stay."""
        chances = u[:, 1:].masked_fill(~free, -1.0)
        last = torch.nn.functional.one_hot(chances.argmax(1), tokens.shape[1]).bool()
        return tokens, ~free | (chances >= self.probability) | last


@dataclass(frozen=True, kw_only=True)
class TokenSwap:
    """Move tokens among each other, none by more than `distance`: sort positions i + (distance + 1) · u_i."""

    distance: int = 2
    """How far a token can go, in tokens that are not protected."""
    probability: float = 1.0
    """Of touching a sample at all, 0..1."""
    protected: tuple[int, ...] = ()
    """Tokens that stay."""
    salt: str = "token swap"
    """Name of its random numbers."""

    def __post_init__(self) -> None:
        _check(self.probability)
        if self.distance < 1:
            raise ValueError(f"expected a distance of at least 1, got {self.distance}")

    def apply(
        self, tokens: Int[Tensor, "batch seq"], free: Bool[Tensor, "batch seq"], u: Float[Tensor, "batch draws"]
    ) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The tokens in their new order; protected ones and padding stay where they are."""
        free = free & (u[:, :1] < self.probability)
        places = free.cumsum(1) - 1
        wanted = (places + (self.distance + 1) * u[:, 1:]).masked_fill(~free, torch.inf)
        moved = tokens.gather(1, wanted.argsort(dim=1, stable=True))  # the free ones first, in their new order
        return torch.where(free, moved.gather(1, places.clamp(min=0)), tokens), torch.ones_like(free)


def _check(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"expected 0 <= probability <= 1, got {probability}")
