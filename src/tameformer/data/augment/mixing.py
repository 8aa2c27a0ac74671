"""Mixed pairs of images with soft labels: mixup and CutMix.

Mixup: Zhang et al. 2017, arXiv:1710.09412. CutMix: Yun et al. 2019, arXiv:1905.04899.
Differ from the papers: the partner of a sample is another sample of the data set, a function of (seed, epoch, index), and
not a neighbour in the batch; results therefore do not depend on how a batch is cut into parts. Each sample has its own
weight. A fetch costs two.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tameformer.data.augment.erasing import rectangles
from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.shapes import Float, Int


@runtime_checkable
class LabelledImages(Protocol):
    """A source of `images` (batch, channels, height, width) and `labels` (batch,)."""

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        ...

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def fetch(self, keys: SampleKeys) -> dict[str, Any]:
        """The samples of these keys."""
        ...


def mixup(
    images: Float[Tensor, "batch channels height width"],
    partners: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, " batch"],
) -> Float[Tensor, "batch channels height width"]:
    """`weight` times the image plus the rest of its partner."""
    share = weight.to(images.dtype)[:, None, None, None]
    return share * images + (1 - share) * partners


def cutmix(
    images: Float[Tensor, "batch channels height width"],
    partners: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, " batch"],
    centre: Float[Tensor, "batch 2"],
) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, " batch"]]:
    """Paste from the partner a rectangle of about 1 - `weight` of the area around `centre`; and the exact weight left.

    `centre` is (y, x) in [0, 1); the rectangle has the image's aspect and is cut at its border, as in the paper.
    """
    height, width = images.shape[-2:]
    size = torch.tensor([height, width], dtype=torch.float64)
    half = (1 - weight.double()).sqrt()[:, None] * size / 2
    low = (centre.double() * size - half).round().clamp(min=0)
    high = torch.minimum((centre.double() * size + half).round(), size)
    pasted = rectangles(low[:, 0], low[:, 1], high[:, 0], high[:, 1], (height, width))
    area = (high - low).prod(-1)
    return torch.where(pasted, partners, images), 1 - area / (height * width)


def soft_labels(
    labels: Int[Tensor, " batch"], partners: Int[Tensor, " batch"], weight: Float[Tensor, " batch"], num_classes: int
) -> Float[Tensor, "batch classes"]:
    """`weight` on the label and the rest on the partner's; float32, rows sum to 1."""
    share = weight.float()[:, None]
    return share * one_hot(labels, num_classes) + (1 - share) * one_hot(partners, num_classes)


@dataclass(frozen=True, eq=False)
class MixedSource:
    """Another source with each sample mixed with one other; labels become float32 (batch, classes).

    With both alphas positive, each sample takes one of the two methods at random; with both 0, only the labels' form
    changes.
    """

    source: LabelledImages
    """Source of images and whole labels; its own transforms are applied to both partners."""
    mixup_alpha: float = 0.0
    """Of the Beta(alpha, alpha) distribution of mixup's weight; 0 switches mixup off."""
    cutmix_alpha: float = 0.0
    """Of the Beta(alpha, alpha) distribution of CutMix's weight; 0 switches CutMix off."""
    probability: float = 1.0
    """Of mixing a sample at all, 0..1."""

    def __post_init__(self) -> None:
        if self.mixup_alpha < 0 or self.cutmix_alpha < 0:
            raise ValueError(f"alphas must not be negative, got {self.mixup_alpha} and {self.cutmix_alpha}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in 0..1, got {self.probability}")
        if len(self.source) < 2:
            raise ValueError(f"mixing needs at least 2 samples, got {len(self.source)}")

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_classes(self) -> int:
        """Classes of the task."""
        return self.source.num_classes

    def fetch(self, keys: SampleKeys) -> dict[str, Any]:
        """Images (batch, channels, height, width), labels float32 (batch, classes), num_items."""
        u = uniforms(keys, 6, "mixed source")
        partner = (u[:, 0] * (len(self.source) - 1)).astype(np.int64)
        partner += partner >= keys.indices  # never the sample itself
        own, other = (self.source.fetch(k) for k in (keys, SampleKeys(keys.seed, keys.epoch, partner)))
        images, weight = own["images"], torch.ones(len(keys), dtype=torch.float64)
        mixed = u[:, 1] < self.probability
        by_mixup = mixed & (u[:, 2] < _share(self.mixup_alpha, self.cutmix_alpha))
        by_cutmix = mixed & ~by_mixup & (self.cutmix_alpha > 0)
        for chosen, alpha in ((by_mixup, self.mixup_alpha), (by_cutmix, self.cutmix_alpha)):
            if chosen.any():
                weight[torch.from_numpy(chosen)] = torch.from_numpy(_beta(u[chosen, 3], alpha))
        pasted, exact = cutmix(images, other["images"], weight, torch.from_numpy(u[:, 4:6]))
        is_cut = torch.from_numpy(by_cutmix)
        images = torch.where(is_cut[:, None, None, None], pasted, mixup(images, other["images"], weight))
        weight = torch.where(is_cut, exact, weight)
        labels = soft_labels(own["labels"], other["labels"], weight, self.num_classes)
        return {**own, "images": images, "labels": labels}


def _share(mixup_alpha: float, cutmix_alpha: float) -> float:
    """Part of the mixed samples that take mixup."""
    if mixup_alpha > 0 and cutmix_alpha > 0:
        return 0.5
    return float(mixup_alpha > 0)


def _beta(u: np.ndarray, alpha: float) -> np.ndarray:
    """Beta(alpha, alpha) from uniform numbers, by the inverse of its distribution function."""
    from scipy.special import betaincinv  # comes with scikit-learn; half a second that most runs need not pay

    return betaincinv(alpha, alpha, u)
