"""Flips, shifts and affine maps of a batch of images, each image by its own numbers; what comes from outside is black."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from tameformer.shapes import Bool, Float, Int


def horizontal_flip(
    images: Float[Tensor, "batch channels height width"], flipped: Bool[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Mirror left and right where `flipped`."""
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)


def shift(
    images: Float[Tensor, "batch channels height width"],
    down: Int[Tensor, " batch"],
    right: Int[Tensor, " batch"],
    padding: Literal["zero", "reflect"] = "zero",
) -> Float[Tensor, "batch channels height width"]:
    """Move each image by whole pixels; the same as padding it and cropping at an offset.

    `reflect` mirrors at the border pixel; shifts must then be smaller than the image.
    """
    batch, channels, height, width = images.shape
    rows = torch.arange(height) - down[:, None]
    columns = torch.arange(width) - right[:, None]
    if padding == "reflect":
        rows = height - 1 - (height - 1 - rows.abs()).abs()
        columns = width - 1 - (width - 1 - columns.abs()).abs()
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None]
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(batch, 1, height * width).expand(-1, channels, -1)
    moved = images.flatten(2).gather(2, places).view_as(images)
    return moved if padding == "reflect" else moved * inside


def warp(
    images: Float[Tensor, "batch channels height width"], matrix: Float[Tensor, "batch 2 3"]
) -> Float[Tensor, "batch channels height width"]:
    """Sample each image, bilinearly, at `matrix` times (x, y, 1): where an output pixel comes from.

    Coordinates are pixels from the centre of the image, x to the right and y down; the identity matrix changes nothing
    (to float rounding).
    """
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=torch.float32) - (width - 1) / 2
    y = torch.arange(height, dtype=torch.float32)[:, None] - (height - 1) / 2
    m = matrix.float()[:, :, :, None, None]  # computed in float64, so that its rounding depends on no vector width
    from_x = m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2]
    from_y = m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2]
    grid = torch.stack([from_x * (2 / width), from_y * (2 / height)], dim=-1)
    return grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def affine_matrix(
    angle: Float[Tensor, " batch"],
    scale: Float[Tensor, " batch"],
    shear_x: Float[Tensor, " batch"],
    shear_y: Float[Tensor, " batch"],
    right: Float[Tensor, " batch"],
    down: Float[Tensor, " batch"],
) -> Float[Tensor, "batch 2 3"]:
    """The map from output to input pixels for `warp`: shift back, shear, turn back, divide by the scale.

    `angle` turns clockwise, in radians; `right` and `down` are in pixels, `scale` above 1 enlarges, shears are tangents.
    float64 in, float64 out.
    """
    cos, sin = angle.cos() / scale, angle.sin() / scale
    linear = torch.stack(
        [cos + sin * shear_y, cos * shear_x + sin, cos * shear_y - sin, cos - sin * shear_x], dim=-1
    ).view(-1, 2, 2)
    offset = -(linear * torch.stack([right, down], dim=-1)[:, None, :]).sum(-1, keepdim=True)
    return torch.cat([linear, offset], dim=-1)


@dataclass(frozen=True, kw_only=True)
class HorizontalFlip:
    """Mirror left and right; not for digits and letters."""

    probability: float = 0.5
    """Of a flip, 0..1."""
    salt: str = "horizontal flip"
    """Name of its random numbers."""
    draws: ClassVar[int] = 1

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The images, some of them mirrored."""
        return horizontal_flip(images, u[:, 0] < self.probability)


@dataclass(frozen=True, kw_only=True)
class RandomShift:
    """Shift by up to `pixels` along each axis: the usual crop after padding."""

    pixels: int = 2
    """Largest shift, in pixels; 0 changes nothing."""
    padding: Literal["zero", "reflect"] = "zero"
    """What comes in at the border."""
    salt: str = "random shift"
    """Name of its random numbers."""
    draws: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"pixels must not be negative, got {self.pixels}")

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The shifted images."""
        if self.pixels >= min(images.shape[-2:]):
            raise ValueError(f"pixels must be smaller than the image, got {self.pixels} for {tuple(images.shape[-2:])}")
        steps = (u * (2 * self.pixels + 1)).long() - self.pixels
        return shift(images, steps[:, 0], steps[:, 1], self.padding)


@dataclass(frozen=True, kw_only=True)
class RandomAffine:
    """A small rotation, shift, change of size and shear, each uniform in plus or minus its bound."""

    degrees: float = 8.0
    """Largest rotation, in degrees."""
    translate: float = 0.05
    """Largest shift, as a part of the side."""
    scale: float = 0.1
    """Largest change of size, as the logarithm of the factor: 0.1 is about 10 %."""
    shear: float = 0.1
    """Largest horizontal shear, as a tangent."""
    salt: str = "random affine"
    """Name of its random numbers."""
    draws: ClassVar[int] = 5

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The mapped images."""
        height, width = images.shape[-2:]
        angle, right, down, size, shear = (2 * u - 1).unbind(-1)
        matrix = affine_matrix(
            angle * math.radians(self.degrees),
            (size * self.scale).exp(),
            shear * self.shear,
            torch.zeros_like(shear),
            right * self.translate * width,
            down * self.translate * height,
        )
        return warp(images, matrix)
