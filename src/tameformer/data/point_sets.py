"""Images as sets: where there is something, and how bright it is; which element comes first means nothing.

An element is a point, a vector of real numbers, or one of finitely many tokens.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.stream import Batch
from tameformer.shapes import Float, Images, Int, Real


@dataclass(frozen=True, eq=False)
class PointSets:
    """A source of images as sets: one point a pixel that is not black, the brightest `max_points` of an image.

    A point is its row and its column, both in [-1, 1], and its value in each channel, in [0, 1].
    """

    source: Any
    """Images, with `mean`, `std` and `image_shape`."""
    max_points: int
    """Points of a set at most."""

    def __post_init__(self) -> None:
        if self.max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {self.max_points}")

    @property
    def width(self) -> int:
        """Numbers of a point."""
        return 2 + self.source.image_shape[0]

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, keys: SampleKeys) -> Batch:
        """`elements` (batch, seq, width) and `real`, True at points and False at padding; `labels`, `num_items`."""
        batch = self.source.fetch(keys)
        pixels, values, real = brightest(self.source, batch["images"], self.max_points)
        height, width = self.source.image_shape[1:]
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
        points = torch.cat([places[pixels], values], dim=2)
        return {
            "elements": points * real[..., None],
            "real": real,
            "labels": batch["labels"],
            "num_items": batch["num_items"],
        }


@dataclass(frozen=True, eq=False)
class TokenSets:
    """A source of images as sets of tokens: one for each place and level of brightness.

    Nothing says that two tokens are neighbours or of nearly the same brightness; that is for the embedding to find out.
    """

    source: Any
    """Images, with `mean`, `std` and `image_shape`."""
    max_points: int
    """Elements of a set at most."""
    levels: int
    """Levels of brightness that are told apart, of equal width."""

    def __post_init__(self) -> None:
        for name in ("max_points", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def vocab_size(self) -> int:
        """Tokens there are."""
        return math.prod(self.source.image_shape[1:]) * self.levels

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, keys: SampleKeys) -> Batch:
        """`elements` (batch, seq), numbers below `vocab_size`, and `real`, `labels` and `num_items` as of `PointSets`."""
        batch = self.source.fetch(keys)
        pixels, values, real = brightest(self.source, batch["images"], self.max_points)
        # The normalization is rounded: a value that stands on the border of two levels belongs to the upper one.
        level = (values.mean(2) * self.levels + 1e-4).long().clamp(0, self.levels - 1)
        return {
            "elements": (pixels * self.levels + level) * real,
            "real": real,
            "labels": batch["labels"],
            "num_items": batch["num_items"],
        }


def brightest(
    source: Any, images: Images, count: int
) -> tuple[Int[Tensor, "batch seq"], Float[Tensor, "batch seq channels"], Real]:
    """The pixels that are not black, at most `count` of an image, and at least one.

    Returns:
        Their numbers, row by row; their values in [0, 1]; and which are no padding.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (source.mean, source.std))
    values = (images * std + mean).flatten(2)  # (batch, channels, pixels)
    brightness = values.mean(1)
    order = brightness.argsort(dim=1, descending=True, stable=True)
    # Rounding of the normalization leaves black pixels at about 1e-8.
    counts = (brightness > 1e-4).sum(1).clamp(1, count)
    order = order[:, : int(counts.max())]
    chosen = values.transpose(1, 2).gather(1, order[..., None].expand(-1, -1, values.shape[1]))
    return order, chosen, torch.arange(order.shape[1]) < counts[:, None]
