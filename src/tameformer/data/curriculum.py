"""Short sequences first, long ones by and by (Platanios et al. 2019, "Competence-based Curriculum Learning", arXiv:1903.09848).

Differs from the paper: when the warm-up is over another plan takes over, so that every epoch sees every sample once.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.plans import Plan
from tameformer.data.randomness import generator
from tameformer.errors import DataError
from tameformer.shapes import Integer

Competence = Callable[[float], float]
"""From how much of the warm-up is over, 0..1, to the share of the samples that may be drawn, the shortest ones, 0..1."""
BatchSize = Callable[[int], int]
"""From how many samples may be drawn, the shortest ones, to how many of them a step draws."""
Lengths = Integer[np.ndarray, " samples"] | Integer[np.ndarray, "samples sides"]


def square_root(progress: float, *, start: float = 0.01) -> float:
    """The paper's: sqrt(progress · (1 - start²) + start²), fast at first (equation 8).

    Example:
        >>> [round(square_root(progress), 2) for progress in (0, 0.25, 1)]
        [0.01, 0.5, 1.0]
    """
    return math.sqrt(progress * (1 - start**2) + start**2)


def linear(progress: float, *, start: float = 0.01) -> float:
    """Evenly from `start` to 1."""
    return start + progress * (1 - start)


def within_tokens(lengths: Lengths, max_tokens: int) -> BatchSize:
    """As many samples as have at most `max_tokens` padded tokens however they are drawn, sides (source, target) padded apart.

    Example:
        >>> size = within_tokens(np.array([[2, 3], [8, 6], [4, 4]]), max_tokens=32)
        >>> size(1), size(2), size(3)  # padded to 2 + 3, to 4 + 4, and to 8 + 6
        (6, 4, 2)
    """
    sides = lengths.reshape(len(lengths), -1)
    padded = np.maximum.accumulate(sides[_short_to_long(lengths)], axis=0).sum(axis=1)
    return lambda admitted: max_tokens // int(padded[admitted - 1])


def _short_to_long(lengths: np.ndarray) -> np.ndarray:
    return np.argsort(lengths.reshape(len(lengths), -1).max(axis=1), kind="stable").astype(np.int64)


class LengthCurriculum:
    """A plan of training that draws from the shortest samples only and ends as another plan.

    Step t of the warm-up draws `batch_size` different samples from the shortest competence(t / warmup_steps) of all, as a
    pure function of (seed, t): any step is reached without the others, and a resumed run goes on exactly. The warm-up is epoch
    0, in which a sample may come several times and looks the same each time; the epochs of the plan behind it count from 1.

    Example:
        >>> from tameformer.data.plans import ShuffledBatches
        >>> lengths = np.array([7, 1, 5, 3, 9, 2])
        >>> plan = LengthCurriculum(ShuffledBatches(6, 2), lengths, warmup_steps=4, batch_size=2)
        >>> [plan.admitted(step) for step in range(4)]
        [2, 4, 5, 6]
        >>> sorted(lengths[plan.batch(0).indices].tolist())
        [1, 2]
    """

    def __init__(
        self,
        then: Plan,
        lengths: Lengths,
        *,
        warmup_steps: int,
        batch_size: int | BatchSize,
        min_batch_size: int = 1,
        competence: Competence = square_root,
        seed: int = 0,
    ) -> None:
        """Put a warm-up before a plan.

        Args:
            then: What comes after the warm-up, over the same samples.
            lengths: Tokens of each sample, or of each of its sides, of which the longer counts.
            warmup_steps: Steps of the warm-up.
            batch_size: Samples of a step of the warm-up; a function says how many of those admitted, see `within_tokens`.
            min_batch_size: Fewest samples of a step whatever the function says: processes x accumulation, so that each has one.
            competence: Which share of the samples may be drawn.
            seed: Data seed.

        Raises:
            DataError: There are fewer samples than `batch_size`.
            ValueError: `warmup_steps`, `batch_size` or `min_batch_size` is below 1.
        """
        least = min_batch_size if callable(batch_size) else max(min_batch_size, batch_size)
        if min(warmup_steps, min_batch_size) < 1 or (not callable(batch_size) and batch_size < 1):
            raise ValueError(
                "expected warmup_steps, batch_size and min_batch_size of at least 1, "
                f"got {warmup_steps}, {batch_size} and {min_batch_size}"
            )
        if len(lengths) < least:
            raise DataError(f"expected at least batch_size {least} samples, got {len(lengths)}: take smaller batches")
        self._order = _short_to_long(lengths)
        self._size: BatchSize = batch_size if callable(batch_size) else lambda admitted: batch_size
        self._least = least
        self.then, self.warmup_steps, self.seed, self.competence = then, warmup_steps, seed, competence

    def steps_in_epoch(self, epoch: int) -> int:
        """The warm-up, then the epochs of the plan behind it."""
        return self.warmup_steps if epoch == 0 else self.then.steps_in_epoch(epoch - 1)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch and step within it; epoch 0 is the warm-up."""
        if step < 0:
            raise IndexError(f"steps are counted from 0, got {step}")
        if step < self.warmup_steps:
            return 0, step
        epoch, place = self.then.locate(step - self.warmup_steps)
        return epoch + 1, place

    def batch(self, step: int) -> SampleKeys:
        """The samples of this optimizer step."""
        if self.locate(step)[0]:
            keys = self.then.batch(step - self.warmup_steps)
            return replace(keys, epoch=keys.epoch + 1)  # what is random about a sample differs from the warm-up
        admitted = self.admitted(step)
        size = min(admitted, max(self._least, self._size(admitted)))
        drawn = generator(seed=self.seed, epoch=step, salt="curriculum").choice(admitted, size, replace=False)
        return SampleKeys(self.seed, 0, self._order[drawn])

    def admitted(self, step: int) -> int:
        """How many samples, counted from the shortest, a step of the warm-up may draw from."""
        share = self.competence(step / self.warmup_steps)
        return min(len(self._order), max(self._least, math.ceil(share * len(self._order))))
