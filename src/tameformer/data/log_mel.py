"""Log-mel features of speech: power in bands that are spaced as the ear hears pitch, one row every few milliseconds.

Davis and Mermelstein 1980, "Comparison of parametric representations for monosyllabic word recognition"; the scale is
mel = 2595 log10(1 + hertz / 700), the bands are triangles of height 1.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tameformer.shapes import Float

FLOOR = 1e-6
"""Power below which all is silence; full scale is 1."""


@dataclass(frozen=True, kw_only=True)
class LogMel:
    """From a wave in [-1, 1] to features with mean 0 and deviation 1 in every band.

    Example:
        >>> LogMel(sample_rate=8000)(torch.randn(8000)).shape
        torch.Size([101, 40])
    """

    sample_rate: int
    """Samples a second."""
    num_mels: int = 40
    """Bands, from 0 to half the sample rate."""
    window_seconds: float = 0.025
    """Length of the window that a row looks at."""
    hop_seconds: float = 0.01
    """From one row to the next."""

    def __post_init__(self) -> None:
        for name in ("sample_rate", "num_mels", "window_seconds", "hop_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        empty = np.flatnonzero(~(self._bands > 0).any(0).numpy())
        if len(empty):
            raise ValueError(
                f"num_mels {self.num_mels} is too many for windows of {self.window} samples: band {empty[0]} holds no "
                "frequency; "
                "take fewer bands or a longer window"
            )

    @property
    def window(self) -> int:
        """Samples of a window."""
        return round(self.window_seconds * self.sample_rate)

    @property
    def hop(self) -> int:
        """Samples from one row to the next."""
        return max(1, round(self.hop_seconds * self.sample_rate))

    def num_frames(self, num_samples: np.ndarray) -> np.ndarray:
        """Rows for waves of these lengths."""
        return num_samples // self.hop + 1

    def __call__(self, wave: Float[Tensor, " samples"]) -> Float[Tensor, "frames mels"]:
        """The features of one wave; rows are centred on multiples of the hop, with silence beyond both ends."""
        size = self._size
        shape = torch.hann_window(self.window, dtype=wave.dtype)
        spectrum = torch.stft(
            wave,
            size,
            self.hop,
            self.window,
            shape,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        power = spectrum.abs().square() / shape.sum().square()
        features = (power.T @ self._bands.to(wave.dtype)).clamp(min=FLOOR).log()
        deviation = features.std(0, correction=0).clamp(min=1e-3)  # a band that never sounds stays 0
        return (features - features.mean(0)) / deviation

    @property
    def _size(self) -> int:
        return 1 << (self.window - 1).bit_length()

    @cached_property
    def _bands(self) -> Float[Tensor, "frequencies mels"]:
        """The weight of each frequency in each band, float64."""
        top = 2595 * np.log10(1 + self.sample_rate / 2 / 700)
        edges = 700 * (10 ** (np.linspace(0, top, self.num_mels + 2) / 2595) - 1)
        hertz = np.arange(self._size // 2 + 1)[:, None] * self.sample_rate / self._size
        low, middle, high = edges[:-2], edges[1:-1], edges[2:]
        triangles = np.minimum((hertz - low) / (middle - low), (high - hertz) / (high - middle))
        return torch.from_numpy(triangles.clip(0))
