"""Augmentations of batches of images or tokens: pure functions of them and of each sample's own random numbers."""

from tameformer.data.augment.erasing import RandomErasing
from tameformer.data.augment.geometry import HorizontalFlip, RandomAffine, RandomShift
from tameformer.data.augment.jitter import ColorJitter, RandomResizedCrop
from tameformer.data.augment.mixing import MixedSource, cutmix, mixup, soft_labels
from tameformer.data.augment.policies import OPERATIONS, WIDE, RandAugment, Ranges, TrivialAugment
from tameformer.data.augment.tokens import TokenDeletion, TokenDropout, TokenSwap, TokenTransform, augment_tokens

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
    "TokenDeletion",
    "TokenDropout",
    "TokenSwap",
    "TokenTransform",
    "TrivialAugment",
    "augment_tokens",
    "cutmix",
    "mixup",
    "soft_labels",
]
