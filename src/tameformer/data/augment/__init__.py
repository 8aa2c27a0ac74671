"""Augmentations of image batches: pure functions of the images and of each sample's own random numbers."""

from tameformer.data.augment.erasing import RandomErasing
from tameformer.data.augment.geometry import HorizontalFlip, RandomAffine, RandomShift
from tameformer.data.augment.jitter import ColorJitter, RandomResizedCrop
from tameformer.data.augment.mixing import MixedSource, cutmix, mixup, soft_labels
from tameformer.data.augment.policies import OPERATIONS, WIDE, RandAugment, Ranges, TrivialAugment

__all__ = [
    "OPERATIONS",
    "WIDE",
    "ColorJitter",
    "HorizontalFlip",
    "MixedSource",
    "RandAugment",
    "RandomAffine",
    "RandomErasing",
    "RandomResizedCrop",
    "RandomShift",
    "Ranges",
    "TrivialAugment",
    "cutmix",
    "mixup",
    "soft_labels",
]
