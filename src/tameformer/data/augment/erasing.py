"""Rectangles erased at random (Zhong et al. 2017, "Random Erasing Data Augmentation", arXiv:1708.04896).

Differs from the paper: the rectangle is filled with one value, and one that would not fit is cut to the image instead
of drawn again, so that each image takes a fixed count of random numbers.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tameformer.shapes import Bool, Float


def rectangles(
    top: Float[Tensor, " batch"],
    left: Float[Tensor, " batch"],
    bottom: Float[Tensor, " batch"],
    right: Float[Tensor, " batch"],
    size: tuple[int, int],
) -> Bool[Tensor, "batch 1 height width"]:
    """True on rows top <= y < bottom and columns left <= x < right, for an image of `size` (height, width)."""
    y, x = torch.arange(size[0]), torch.arange(size[1])
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return rows[:, None, :, None] & columns[:, None, None, :]


@dataclass(frozen=True, kw_only=True)
class RandomErasing:
    """Fill a random rectangle of an image with one value."""

    probability: float = 0.25
    """Of erasing anything, 0..1."""
    area: tuple[float, float] = (0.02, 0.33)
    """Smallest and largest part of the image."""
    max_aspect: float = 3.3
    """Largest ratio of the sides; drawn evenly in its logarithm, both ways."""
    fill: float = 0.0
    """Value of the erased pixels, in [0, 1]."""
    salt: str = "random erasing"
    """Name of its random numbers."""
    draws: ClassVar[int] = 5

    def __post_init__(self) -> None:
        if not 0 <= self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area must rise within 0..1, got {self.area}")
        if self.max_aspect < 1:
            raise ValueError(f"max_aspect must be at least 1, got {self.max_aspect}")

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The images, some of them with a hole."""
        height, width = images.shape[-2:]
        area = (self.area[0] + u[:, 1] * (self.area[1] - self.area[0])) * height * width
        aspect = ((2 * u[:, 2] - 1) * math.log(self.max_aspect)).exp()
        tall = (area * aspect).sqrt().round().clamp(max=height)
        wide = (area / aspect).sqrt().round().clamp(max=width)
        top = (u[:, 3] * (height - tall + 1)).floor()
        left = (u[:, 4] * (width - wide + 1)).floor()
        erased = rectangles(top, left, top + tall, left + wide, (height, width))
        erased &= (u[:, 0] < self.probability)[:, None, None, None]
        return images.masked_fill(erased, self.fill)
