"""Images that fit in memory, kept as they came (uint8 where possible) and normalized on the way out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch

from tameformer.data.keys import SampleKeys
from tameformer.data.sources.images import Transform, augment, check_transforms, stratified_split
from tameformer.data.stream import Batch
from tameformer.errors import DataError


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Labelled images of one size, as arrays.

    uint8 images are divided by 255, floats are taken as they are; transforms see that value, and (value - mean) / std
    comes last. Variants are made by `take`, `hold_out` and `dataclasses.replace(source, transforms=...)`.

    Raises:
        DataError: arrays that do not fit together.
    """

    images: np.ndarray
    """uint8 or float32, shape (samples, channels, height, width)."""
    labels: np.ndarray
    """int64 class numbers from 0, shape (samples,)."""
    mean: tuple[float, ...] = field(kw_only=True)
    """Per channel, in the unit that transforms see."""
    std: tuple[float, ...] = field(kw_only=True)
    """Per channel, in the unit that transforms see."""
    num_classes: int = field(kw_only=True)
    """Classes of the task, whether or not all of them occur here."""
    class_names: tuple[str, ...] = field(kw_only=True, default=())
    """In the order of the class numbers; empty when unknown."""
    transforms: tuple[Transform, ...] = field(kw_only=True, default=())
    """Augmentations, applied in order."""
    name: str = field(kw_only=True, default="arrays")
    """What errors call this data."""

    def __post_init__(self) -> None:
        check_images(self.images, self.labels, self.num_classes, self.name)
        channels = self.images.shape[1]
        for field_name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{field_name} needs one value per channel: expected {channels}, got {len(values)}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"std must be positive in every channel, got {self.std}; drop channels that never vary")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"expected {self.num_classes} class names, got {len(self.class_names)}")
        check_transforms(self.transforms)
        needy = [type(transform).__name__ for transform in self.transforms if getattr(transform, "unit_range", False)]
        if needy and self.images.dtype != np.uint8 and (self.images.min() < 0 or self.images.max() > 1):
            raise ValueError(
                f"{needy[0]} needs values in [0, 1], got {self.images.min():g} to {self.images.max():g} in {self.name}; "
                "scale the images, or leave it out"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    def fetch(self, keys: SampleKeys) -> Batch:
        """Images (batch, channels, height, width) float32, labels (batch,) int64, num_items."""
        images = torch.from_numpy(np.take(self.images, keys.indices, axis=0))
        if images.dtype == torch.uint8:
            images = images.float().mul_(1 / 255)
        images = augment(images, keys, self.transforms)
        mean, std = self._statistics
        labels = torch.from_numpy(np.take(self.labels, keys.indices))
        return {"images": (images - mean).div_(std), "labels": labels, "num_items": len(keys)}

    @cached_property
    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def take(self, indices: np.ndarray) -> "ArraySource":
        """The samples at these positions, as a source of their own."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def hold_out(self, fraction: float, *, seed: int = 0) -> tuple["ArraySource", "ArraySource"]:
        """The rest, and a stratified part without transforms; both keep this source's mean and std.

        Raises:
            DataError: the part, or the rest, would be empty.
        """
        rest, part = stratified_split(self.labels, fraction, seed=seed)
        if len(part) == 0 or len(rest) == 0:
            raise DataError(
                f"{self.name}: a part of {fraction} of {len(self)} samples leaves {len(rest)} and {len(part)}; "
                "choose a fraction that leaves samples on both sides"
            )
        return self.take(rest), replace(self.take(part), transforms=())


def array_source(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    like: ArraySource | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    name: str = "arrays",
) -> ArraySource:
    """A source over arrays of any usual layout, normalized by its own statistics or those of another source.

    Args:
        images: uint8 or float, (samples, height, width), (samples, height, width, channels) or
            (samples, channels, height, width); channels are 1, 3 or 4.
        labels: integers from 0.
        like: take mean, std, classes and names from this source (the training split).
        num_classes: classes of the task; by default the largest label plus one.
        class_names: in the order of the labels.
        name: what errors call this data.

    Raises:
        DataError: arrays that cannot be images and labels; the message says which, why, and what to do.
    """
    images = channels_first(images, name)
    labels = integer_labels(labels, name)
    if num_classes is None:
        num_classes = like.num_classes if like else len(class_names) or int(labels.max(initial=0)) + 1
    check_images(images, labels, num_classes, name)
    if like is not None:
        if images.shape[1:] != like.images.shape[1:] or (images.dtype == np.uint8) != (like.images.dtype == np.uint8):
            raise DataError(
                f"{name}: images are {images.dtype} of shape {images.shape[1:]}, those of {like.name} are "
                f"{like.images.dtype} of shape {like.images.shape[1:]}; convert one to the other's size and type"
            )
        return replace(like, images=images, labels=labels, transforms=(), num_classes=num_classes, name=name)
    mean, std = channel_statistics(images)
    return ArraySource(
        images, labels, mean=mean, std=std, num_classes=num_classes, class_names=tuple(class_names), name=name
    )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of (samples, channels, height, width), uint8 counted as value / 255.

    A channel that never varies has a standard deviation of 1, so that dividing by it does nothing.
    """
    scale = 255.0 if images.dtype == np.uint8 else 1.0
    means, deviations = [], []
    for channel in range(images.shape[1]):
        values = images[:, channel]
        if images.dtype == np.uint8:  # exact, and without a float copy of the data
            counts = np.bincount(values.reshape(-1), minlength=256)
            levels = np.arange(256)
            mean = float((counts * levels).sum() / counts.sum())
            deviation = float(np.sqrt((counts * (levels - mean) ** 2).sum() / counts.sum()))
        else:
            mean, deviation = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
        means.append(mean / scale)
        deviations.append(deviation / scale or 1.0)
    return tuple(means), tuple(deviations)


def channels_first(images: np.ndarray, name: str) -> np.ndarray:
    """Images as uint8 or float32 (samples, channels, height, width), contiguous."""
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise DataError(f"{name}: images have dtype {images.dtype}; expected uint8 (0..255) or float: convert them")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim != 4:
        raise DataError(
            f"{name}: images have shape {images.shape}; expected (samples, height, width), "
            "(samples, height, width, channels) or (samples, channels, height, width)"
        )
    elif images.shape[1] not in (1, 3, 4) and images.shape[3] in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    elif images.shape[1] not in (1, 3, 4):
        raise DataError(f"{name}: images have shape {images.shape}, where no axis of 1, 3 or 4 is the channels")
    return np.ascontiguousarray(images, dtype=np.uint8 if images.dtype == np.uint8 else np.float32)


def integer_labels(labels: np.ndarray, name: str) -> np.ndarray:
    """Labels as int64 (samples,); an extra axis of length 1 is dropped."""
    if labels.dtype.kind not in "iu":
        raise DataError(f"{name}: labels have dtype {labels.dtype}; expected integers from 0: encode the classes")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise DataError(f"{name}: labels have shape {labels.shape}; expected (samples,), one class number per image")
    return labels.astype(np.int64)


def check_images(images: np.ndarray, labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raise a DataError unless images and labels can be trained on together."""
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"{name}: images are {images.dtype} of shape {images.shape}; expected uint8 or float32 of shape "
            "(samples, channels, height, width): see array_source"
        )
    if labels.ndim != 1 or labels.dtype != np.int64:
        raise DataError(f"{name}: labels are {labels.dtype} of shape {labels.shape}; expected int64 (samples,)")
    if len(images) != len(labels):
        raise DataError(f"{name}: {len(images)} images but {len(labels)} labels; there must be one label per image")
    if images.size == 0:
        raise DataError(f"{name}: no images: the shape is {images.shape}; at least one sample is needed")
    if images.dtype != np.uint8 and not np.isfinite(images).all():
        sample = int(np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))[0])
        raise DataError(f"{name}: image {sample} holds values that are not finite; drop or repair it")
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"{name}: label {labels[wrong[0]]} of sample {wrong[0]} is outside 0..{num_classes - 1} ({len(wrong)} such "
            "labels); number the classes from 0, or raise the number of classes"
        )
