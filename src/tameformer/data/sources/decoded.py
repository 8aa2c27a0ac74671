"""Images that stay encoded until they are fetched: files of a folder, rows of a hub data set."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tameformer.data.keys import SampleKeys
from tameformer.data.sources.images import Transform, augment, check_transforms, stratified_split
from tameformer.data.sources.pixels import decode
from tameformer.data.stream import Batch
from tameformer.errors import DataError


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodedImages:
    """Labelled encoded images; `fetch` decodes, scales, augments and normalizes, in worker processes if there are any."""

    images: Sequence[Any]
    """Anything `decode` takes, by position."""
    positions: np.ndarray
    """Sample i is `images[positions[i]]`, int64."""
    labels: np.ndarray
    """int64 class numbers from 0, one per position."""
    size: int
    """Side of the square that images are scaled and centre-cropped to, in pixels."""
    channels: int = 3
    """1, 3 or 4."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel, of values in [0, 1]."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per channel, of values in [0, 1]."""
    num_classes: int
    """Classes of the task."""
    class_names: tuple[str, ...] = ()
    """In the order of the class numbers; empty when unknown."""
    transforms: tuple[Transform, ...] = ()
    """Augmentations, applied in order to values in [0, 1]."""
    name: str = field(default="images")
    """What errors call this data."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3, 4):
            raise ValueError(f"channels must be 1, 3 or 4, got {self.channels}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        for field_name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(
                    f"{field_name} needs one value per channel: expected {self.channels}, got {len(values)}"
                )
        if len(self.positions) == 0:
            raise DataError(f"{self.name}: no images; at least one sample is needed")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))
        if len(wrong):
            raise DataError(
                f"{self.name}: label {self.labels[wrong[0]]} of sample {wrong[0]} is outside 0..{self.num_classes - 1}; "
                "drop unlabelled samples (often the hidden test split), or raise the number of classes"
            )
        check_transforms(self.transforms)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.channels, self.size, self.size

    def fetch(self, keys: SampleKeys) -> Batch:
        """Images (batch, channels, size, size) float32, labels (batch,) int64, num_items."""
        pixels = np.stack([self._decoded(int(position)) for position in self.positions[keys.indices]])
        images = augment(torch.from_numpy(pixels).float().mul_(1 / 255), keys, self.transforms)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        labels = torch.from_numpy(self.labels[keys.indices])
        return {"images": (images - mean).div_(std), "labels": labels, "num_items": len(keys)}

    def take(self, indices: np.ndarray) -> "DecodedImages":
        """The samples at these positions, as a source of their own."""
        return replace(self, positions=self.positions[indices], labels=self.labels[indices])

    def hold_out(self, fraction: float, *, seed: int = 0) -> tuple["DecodedImages", "DecodedImages"]:
        """The rest, and a stratified part without transforms.

        Raises:
            DataError: the part, or the rest, would be empty.
        """
        rest, part = stratified_split(self.labels, fraction, seed=seed)
        return self.take(rest), replace(self.take(part), transforms=())

    def _decoded(self, position: int) -> np.ndarray:
        encoded = self.images[position]
        name = str(encoded) if isinstance(encoded, str) else f"{self.name}: image {position}"
        return decode(encoded, channels=self.channels, size=self.size, name=name)
