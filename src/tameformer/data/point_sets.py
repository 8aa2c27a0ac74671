"""Images as sets of points: where there is something, and how bright it is; which point comes first means nothing."""

from dataclasses import dataclass
from typing import Any

import torch

from tameformer.data.keys import SampleKeys
from tameformer.data.stream import Batch


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
        """`points` (batch, seq, width) and `real`, True at points and False at padding; `labels`, `num_items`."""
        batch = self.source.fetch(keys)
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.source.mean, self.source.std))
        values = (batch["images"] * std + mean).flatten(2)  # (batch, channels, pixels)
        height, width = self.source.image_shape[1:]
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()])
        brightness = values.mean(1)
        order = brightness.argsort(dim=1, descending=True, stable=True)
        # Rounding of the normalization leaves black pixels at about 1e-8.
        counts = (brightness > 1e-4).sum(1).clamp(1, self.max_points)
        order = order[:, : int(counts.max())]
        points = torch.cat([places.expand(len(values), -1, -1), values], dim=1).transpose(1, 2)
        chosen = points.gather(1, order[..., None].expand(-1, -1, points.shape[2]))
        real = torch.arange(order.shape[1]) < counts[:, None]
        return {
            "points": chosen * real[..., None],
            "real": real,
            "labels": batch["labels"],
            "num_items": batch["num_items"],
        }
