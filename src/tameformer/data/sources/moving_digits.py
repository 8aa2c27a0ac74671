"""Films of a handwritten digit that moves straight across a dark field (after Srivastava et al. 2015, arXiv:1502.04681)."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.data.sources.arrays import ArraySource
from tameformer.data.stream import Batch
from tameformer.errors import DataError

DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
"""The classes of movement, each an eighth of a turn from the one before."""
Target = Literal["direction", "digit", "both"]


@dataclass(frozen=True, eq=False)
class MovingDigits:
    """Films made when they are asked for: a function of (seed, epoch, index).

    A digit of the source moves from frame to frame by the same distance in one of eight directions; the middle of its way is
    anywhere. What leaves the field comes back on the other side, so that neither a single frame nor the place of the digit
    tells where it goes. Between pixels it is interpolated.

    Raises:
        DataError: The field is smaller than a digit.
    """

    digits: ArraySource
    """Images of one channel; their normalization is taken over."""
    num_samples: int = field(kw_only=True)
    """Films of an epoch."""
    num_frames: int = field(kw_only=True, default=8)
    """Frames of a film."""
    side: int = field(kw_only=True, default=16)
    """Rows and columns of a film, in pixels."""
    speed: tuple[float, float] = field(kw_only=True, default=(0.7, 1.4))
    """Slowest and fastest movement, in pixels a frame."""
    target: Target = field(kw_only=True, default="direction")
    """What a film's class is."""
    noise: float = field(kw_only=True, default=0.0)
    """Deviation of the noise on every pixel, where white is 1."""
    salt: str = field(kw_only=True, default="films")
    """Name of the random numbers; another one gives other films."""

    def __post_init__(self) -> None:
        channels, *sides = self.digits.image_shape
        if channels != 1 or self.side < max(sides):
            raise DataError(
                f"expected images of one channel and at most {self.side} x {self.side} pixels, got {channels} of "
                f"{sides[0]} x {sides[1]}; raise data.side to {max(sides)} or more"
            )

    def __len__(self) -> int:
        return self.num_samples

    @property
    def class_names(self) -> tuple[str, ...]:
        """Directions, digits, or pairs of them."""
        names = self.digits.class_names
        pairs = tuple(f"{name} {direction}" for name in names for direction in DIRECTIONS)
        return {"direction": DIRECTIONS, "digit": names, "both": pairs}[self.target]

    @cached_property
    def film_shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, rows, columns."""
        return 1, self.num_frames, self.side, self.side

    def fetch(self, keys: SampleKeys) -> Batch:
        """Films (batch, 1, frames, rows, columns) float32, labels (batch,) int64, num_items."""
        noisy = self.num_frames * self.side**2 if self.noise else 0
        u = uniforms(keys, 5 + 2 * noisy, self.salt)
        chosen = (u[:, 0] * len(self.digits)).astype(np.int64)
        direction = (u[:, 1] * len(DIRECTIONS)).astype(np.int64)
        low, high = self.speed
        speed, angle = low + (high - low) * u[:, 2], direction * (2 * math.pi / len(DIRECTIONS))
        middle = (u[:, 3:5] - 0.5) * self.side
        steps = np.arange(self.num_frames) - (self.num_frames - 1) / 2
        rows = middle[:, :1] + np.sin(angle)[:, None] * speed[:, None] * steps
        columns = middle[:, 1:] + np.cos(angle)[:, None] * speed[:, None] * steps
        films = self._placed(self._fields[chosen], rows, columns)
        if noisy:
            films = films + self.noise * _normal(u[:, 5 : 5 + noisy], u[:, 5 + noisy :]).reshape(films.shape)
        mean, std = self.digits.mean[0], self.digits.std[0]
        digit = self.digits.labels[chosen]
        labels = {"direction": direction, "digit": digit, "both": digit * len(DIRECTIONS) + direction}[self.target]
        return {
            "films": torch.from_numpy(((films - mean) / std).astype(np.float32))[:, None],
            "labels": torch.from_numpy(labels.astype(np.int64)),
            "num_items": len(keys),
        }

    @cached_property
    def _fields(self) -> np.ndarray:
        """All images in the middle of a dark field."""
        images = self.digits.images[:, 0].astype(np.float64)
        if self.digits.images.dtype == np.uint8:
            images = images / 255
        top, left = (self.side - images.shape[1]) // 2, (self.side - images.shape[2]) // 2
        rest = self.side - images.shape[1] - top, self.side - images.shape[2] - left
        return np.pad(images, ((0, 0), (top, rest[0]), (left, rest[1])))

    def _placed(self, fields: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Each field moved by each of its places: bilinear between pixels, round the edges."""
        batch, frames = np.arange(len(fields))[:, None, None, None], np.arange(self.side)
        whole_rows, whole_columns = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
        beyond_row, beyond_column = (
            (rows - whole_rows)[:, :, None, None],
            (columns - whole_columns)[:, :, None, None],
        )
        total = 0.0
        for row, row_share in ((0, 1 - beyond_row), (1, beyond_row)):
            for column, column_share in ((0, 1 - beyond_column), (1, beyond_column)):
                down = (frames[None, None, :, None] - whole_rows[:, :, None, None] - row) % self.side
                across = (frames[None, None, None, :] - whole_columns[:, :, None, None] - column) % self.side
                total = total + row_share * column_share * fields[batch, down, across]
        return np.asarray(total)


def _normal(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Normal numbers from pairs of uniform ones (Box and Muller 1958)."""
    return np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * math.pi * v)
