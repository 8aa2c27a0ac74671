"""SpecAugment: bands and stretches of time taken out of the features (Park et al. 2019, arXiv:1904.08779).

Differs from the paper: no time warping, which its authors found to matter least; what is taken out becomes 0, the mean.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tameformer.shapes import Float


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Masks over bands and over rows, each of a width drawn uniformly, at a place drawn uniformly."""

    num_band_masks: int = 2
    """Stretches of bands taken out."""
    band_width: int = 8
    """Widest stretch of bands."""
    num_time_masks: int = 2
    """Stretches of rows taken out."""
    time_width: int = 20
    """Widest stretch of rows."""
    time_share: float = 0.2
    """Largest share of an utterance's rows that one mask takes."""

    def __post_init__(self) -> None:
        for name in ("num_band_masks", "band_width", "num_time_masks", "time_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.time_share <= 1:
            raise ValueError(f"time_share must lie in [0, 1], got {self.time_share}")

    @property
    def draws(self) -> int:
        """Uniform numbers it takes per utterance."""
        return 2 * (self.num_band_masks + self.num_time_masks)

    def __call__(self, features: Float[Tensor, "frames mels"], u: np.ndarray) -> Float[Tensor, "frames mels"]:
        """The features of one utterance with its masks; `u` are its own numbers in [0, 1)."""
        features, numbers = features.clone(), iter(u.tolist())
        frames, bands = features.shape
        for count, widest, size, axis in (
            (self.num_band_masks, self.band_width, bands, 1),
            (self.num_time_masks, min(self.time_width, int(self.time_share * frames)), frames, 0),
        ):
            for _ in range(count):
                width = min(int(next(numbers) * (widest + 1)), size)
                start = int(next(numbers) * (size - width + 1))
                features.narrow(axis, start, width).zero_()
        return features
