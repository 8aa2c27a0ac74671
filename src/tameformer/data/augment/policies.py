"""Policies that pick operations at random: RandAugment and TrivialAugment, on tensors.

RandAugment: Cubuk et al. 2019, arXiv:1909.13719. TrivialAugment: Mueller and Hutter 2021, arXiv:2103.10158.
Differ from the papers: one operation set for both, the 14 of TrivialAugment; translations are a part of the side, so that
a policy means the same on 28 and on 224 pixels; geometry is bilinear, black outside. Not for values outside [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tameformer.data.augment import color
from tameformer.data.augment.geometry import affine_matrix, warp
from tameformer.shapes import Float, Int

GEOMETRY = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
"""Operations that are affine maps; all images that take one of them are sampled together."""

OPERATIONS = (
    "identity",
    *GEOMETRY,
    "brightness",
    "contrast",
    "saturation",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
"""Names of all operations; the last two have no strength."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What an operation does at level 1; at level 0 it does nothing. Defaults: torchvision's RandAugment space."""

    rotate: float = 30.0
    """Degrees, either way."""
    shear: float = 0.3
    """Tangent, either way."""
    translate: float = 0.45
    """Part of the side, either way."""
    enhance: float = 0.9
    """Change of the factor of brightness, contrast, saturation and sharpness from 1, either way."""
    posterize: int = 4
    """Bits dropped, of 8."""
    solarize: float = 1.0
    """Part of the range of values that is inverted."""


WIDE = Ranges(rotate=135.0, shear=0.99, translate=1.0, enhance=0.99, posterize=6, solarize=1.0)
"""TrivialAugment's own space, for photographs; a digit turned by 135 degrees is no longer that digit."""


def apply_operations(
    images: Float[Tensor, "batch channels height width"],
    operations: Int[Tensor, " batch"],
    levels: Float[Tensor, " batch"],
    signs: Float[Tensor, " batch"],
    ranges: Ranges,
) -> Float[Tensor, "batch channels height width"]:
    """Apply to each image the operation of its number in `OPERATIONS`, at a level in [0, 1], with a sign of -1 or 1."""
    images = images.clone()
    signed = levels * signs
    geometric = (operations >= 1) & (operations <= len(GEOMETRY))
    if geometric.any():
        images[geometric] = _moved(images[geometric], operations[geometric], signed[geometric], ranges)
    for number in operations[~geometric].unique().tolist():
        change = _TONES.get(OPERATIONS[number])
        if change is not None:
            chosen = operations == number
            images[chosen] = change(images[chosen], levels[chosen], signed[chosen], ranges)
    return images


@dataclass(frozen=True, kw_only=True)
class TrivialAugment:
    """One operation per image, at a level drawn evenly from 31."""

    ranges: Ranges = Ranges()
    """What level 1 means; `WIDE` is the paper's."""
    operations: tuple[str, ...] = OPERATIONS
    """Names to draw from, evenly."""
    salt: str = "trivial augment"
    """Name of its random numbers."""
    draws: ClassVar[int] = 3
    unit_range: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_operations(self.operations)

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The changed images."""
        levels = (u[:, 1] * 31).floor() / 30
        return apply_operations(images, _drawn(self.operations, u[:, 0]), levels, _signs(u[:, 2]), self.ranges)


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_operations` operations per image one after the other, all at one level."""

    num_operations: int = 2
    """How many; 0 changes nothing."""
    magnitude: float = 9.0
    """Level, of 30."""
    ranges: Ranges = Ranges()
    """What level 1 means."""
    operations: tuple[str, ...] = OPERATIONS
    """Names to draw from, evenly."""
    salt: str = "rand augment"
    """Name of its random numbers."""
    unit_range: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_operations(self.operations)
        if self.num_operations < 0 or not 0 <= self.magnitude <= 30:
            raise ValueError(
                "num_operations must not be negative and magnitude must be in 0..30, "
                f"got {self.num_operations} and {self.magnitude}"
            )

    @property
    def draws(self) -> int:
        """An operation and a sign each."""
        return 2 * self.num_operations

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The changed images."""
        levels = torch.full((len(images),), self.magnitude / 30, dtype=torch.float64)
        for round_ in range(self.num_operations):
            operation, sign = u[:, 2 * round_], u[:, 2 * round_ + 1]
            images = apply_operations(images, _drawn(self.operations, operation), levels, _signs(sign), self.ranges)
        return images


def _moved(images: Tensor, operations: Tensor, signed: Tensor, ranges: Ranges) -> Tensor:
    height, width = images.shape[-2:]

    def amount(name: str, bound: float) -> Tensor:
        return torch.where(operations == OPERATIONS.index(name), signed * bound, 0.0)

    matrix = affine_matrix(
        amount("rotate", math.radians(ranges.rotate)),
        torch.ones_like(signed),
        amount("shear_x", ranges.shear),
        amount("shear_y", ranges.shear),
        amount("translate_x", ranges.translate * width),
        amount("translate_y", ranges.translate * height),
    )
    return warp(images, matrix)


_TONES: dict[str, Callable[[Tensor, Tensor, Tensor, Ranges], Tensor]] = {
    "brightness": lambda images, level, signed, ranges: color.brightness(images, 1 + signed * ranges.enhance),
    "contrast": lambda images, level, signed, ranges: color.contrast(images, 1 + signed * ranges.enhance),
    "saturation": lambda images, level, signed, ranges: color.saturation(images, 1 + signed * ranges.enhance),
    "sharpness": lambda images, level, signed, ranges: color.sharpness(images, 1 + signed * ranges.enhance),
    "posterize": lambda images, level, signed, ranges: color.posterize(images, 8 - (level * ranges.posterize).round()),
    "solarize": lambda images, level, signed, ranges: color.solarize(images, 1 - level * ranges.solarize),
    "autocontrast": lambda images, level, signed, ranges: color.autocontrast(images),
    "equalize": lambda images, level, signed, ranges: color.equalize(images),
}


def _check_operations(names: tuple[str, ...]) -> None:
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown or not names:
        raise ValueError(f"operations must be some of {', '.join(OPERATIONS)}; got {unknown or 'none'}")


def _drawn(names: tuple[str, ...], u: Tensor) -> Tensor:
    numbers = torch.tensor([OPERATIONS.index(name) for name in names])
    return numbers[(u * len(names)).long()]


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).double()
