"""What all image sources share: from images in [0, 1] to what the model is given."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import permutation, uniforms
from tameformer.shapes import Float


@runtime_checkable
class Transform(Protocol):
    """An augmentation of images in [0, 1]: a pure function of the images and of each sample's own numbers."""

    @property
    def draws(self) -> int:
        """Uniform numbers it takes per sample."""
        ...

    @property
    def salt(self) -> str:
        """Name of its random numbers, unique within a pipeline."""
        ...

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], u: Float[Tensor, "batch draws"]
    ) -> Float[Tensor, "batch channels height width"]:
        """The augmented images, of the same shape."""
        ...


def check_transforms(transforms: Sequence[Transform]) -> None:
    """Refuse two transforms of one salt: they would draw the same numbers."""
    salts = [transform.salt for transform in transforms]
    twice = sorted({salt for salt in salts if salts.count(salt) > 1})
    if twice:
        raise ValueError(f"each transform needs its own salt, got {twice} more than once; pass salt=... to one of them")


def augment(
    images: Float[Tensor, "batch channels height width"], keys: SampleKeys, transforms: Sequence[Transform]
) -> Float[Tensor, "batch channels height width"]:
    """Apply the transforms in order, each with the samples' own random numbers."""
    for transform in transforms:
        images = transform(images, torch.from_numpy(uniforms(keys, transform.draws, transform.salt)))
    return images


def stratified_split(labels: np.ndarray, fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rest and of a part with about `fraction` of every class, both in ascending order.

    The part has `round(fraction * len(labels))` samples in all; the seats left over after rounding down go to the
    classes with the largest remainders.

    Raises:
        ValueError: fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1, got {fraction}")
    order = permutation(len(labels), seed=seed, epoch=0, salt="stratified split")
    classes, counts = np.unique(labels, return_counts=True)
    shares = counts * fraction
    taken = np.floor(shares).astype(np.int64)
    missing = round(fraction * len(labels)) - taken.sum()
    taken[np.argsort(taken - shares, kind="stable")[:missing]] += 1
    part = np.concatenate(
        [order[labels[order] == label][:count] for label, count in zip(classes, taken, strict=True)]
        or [np.zeros(0, dtype=np.int64)]
    )
    return np.setdiff1d(np.arange(len(labels)), part), np.sort(part)
