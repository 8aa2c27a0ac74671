"""Parts of an image blown up, and changes of its colours: the two that matter for SimCLR (Chen et al. 2020, section 3.1).

Differs from the paper: no change of hue, and grey images keep their one channel; sampling is bilinear.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tameformer.data.augment.color import brightness, contrast, grey, saturation
from tameformer.data.augment.geometry import warp
from tameformer.shapes import Float


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop:
    """A random part of the image, enlarged to the image's size (Szegedy et al. 2014, arXiv:1409.4842)."""

    smallest: float = 0.4
    """Least share of the area that is kept, above 0; the largest is 1."""
    ratio: float = 4 / 3
    """Largest aspect ratio of the part; the smallest is its inverse."""
    salt: str = "random resized crop"
    """Name of its random numbers."""
    draws: ClassVar[int] = 4

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1 or self.ratio < 1:
            raise ValueError(f"expected 0 < smallest <= 1 <= ratio, got {self.smallest} and {self.ratio}")

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The parts; a part that would be longer than a side is cut to it."""
        height, width = images.shape[-2:]
        area, aspect, right, down = u.unbind(-1)
        side = (self.smallest + (1 - self.smallest) * area).sqrt()
        stretch = ((2 * aspect - 1) * math.log(self.ratio) / 2).exp()
        wide, tall = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        zero = torch.zeros_like(wide)
        matrix = torch.stack(
            [
                torch.stack([wide, zero, (2 * right - 1) * (1 - wide) / 2 * width], dim=-1),
                torch.stack([zero, tall, (2 * down - 1) * (1 - tall) / 2 * height], dim=-1),
            ],
            dim=1,
        )
        return warp(images, matrix)


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Brightness, contrast and saturation times a factor each, and sometimes no colour at all; for values in [0, 1]."""

    strength: float = 0.4
    """Each factor is uniform in 1 minus to 1 plus this."""
    grey_probability: float = 0.2
    """Of an image without colours; grey images stay as they are."""
    salt: str = "color jitter"
    """Name of its random numbers."""
    draws: ClassVar[int] = 4
    unit_range: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1 or not 0 <= self.grey_probability <= 1:
            raise ValueError(
                f"expected strength and grey_probability in [0, 1], got {self.strength} and {self.grey_probability}"
            )

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The changed images, in [0, 1]."""
        for number, change in enumerate((brightness, contrast, saturation)):
            images = change(images, 1 + self.strength * (2 * u[:, number] - 1))
        without = (u[:, 3] < self.grey_probability)[:, None, None, None]
        return torch.where(without, grey(images).expand_as(images), images) if images.shape[1] > 1 else images
