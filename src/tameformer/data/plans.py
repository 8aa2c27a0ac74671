"""Which samples each optimizer step sees: pure functions of (seed, step), so any step is reached without the others."""

from typing import Protocol, runtime_checkable

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import permutation
from tameformer.errors import DataError


@runtime_checkable
class Plan(Protocol):
    """The order of training: the global batch of every optimizer step, over all processes and micro-batches."""

    def steps_in_epoch(self, epoch: int) -> int:
        """Optimizer steps of this pass over the data."""
        ...

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its place within the epoch, both from 0."""
        ...

    def batch(self, step: int) -> SampleKeys:
        """The samples of this optimizer step."""
        ...


class ShuffledBatches:
    """Every epoch in a new order that depends on (seed, epoch) only; the ragged tail of an epoch is dropped."""

    def __init__(self, num_samples: int, batch_size: int, seed: int = 0) -> None:
        """Plan batches of `batch_size` over `num_samples`.

        Raises:
            DataError: the batch is larger than the data.
        """
        _check_sizes(num_samples, batch_size)
        if batch_size > num_samples:
            raise DataError(
                f"batch_size {batch_size} is larger than the data, which has {num_samples} samples: "
                f"take a batch_size of at most {num_samples}, or more data"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch asked for last

    def steps_in_epoch(self, epoch: int) -> int:
        """Full batches in one pass; the same for every epoch."""
        return self.num_samples // self.batch_size

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch and step within it."""
        return divmod(_checked_step(step), self.num_samples // self.batch_size)

    def batch(self, step: int) -> SampleKeys:
        """The step's slice of its epoch's order."""
        epoch, place = self.locate(step)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self.num_samples, seed=self.seed, epoch=epoch, salt="order")
        begin = place * self.batch_size
        return SampleKeys(self.seed, epoch, self._order[1][begin : begin + self.batch_size])


class SequentialBatches:
    """One pass in the order of the source, the ragged tail kept: for evaluation."""

    def __init__(self, num_samples: int, batch_size: int) -> None:
        _check_sizes(num_samples, batch_size)
        self.num_samples = num_samples
        self.batch_size = batch_size

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches of the one pass, the last of which may be short."""
        return -(-self.num_samples // self.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        """Always epoch 0.

        Raises:
            IndexError: the pass has no such step.
        """
        if step >= self.steps_in_epoch(0):
            raise IndexError(f"step {step} lies beyond the single pass of {self.steps_in_epoch(0)} batches")
        return 0, _checked_step(step)

    def batch(self, step: int) -> SampleKeys:
        """Samples step * batch_size and the following."""
        _, place = self.locate(step)
        begin = place * self.batch_size
        return SampleKeys(0, 0, np.arange(begin, min(begin + self.batch_size, self.num_samples), dtype=np.int64))


class FirstBatches:
    """The first `count` steps of a plan over and over, augmentation included: can the model learn them by heart?"""

    def __init__(self, plan: Plan, count: int) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.plan = plan
        self.count = count

    def steps_in_epoch(self, epoch: int) -> int:
        """`count`: an epoch is one round of the repeated batches."""
        return self.count

    def locate(self, step: int) -> tuple[int, int]:
        """Round and step within it."""
        return divmod(_checked_step(step), self.count)

    def batch(self, step: int) -> SampleKeys:
        """What the plan has at `step` modulo `count`."""
        return self.plan.batch(_checked_step(step) % self.count)


def _check_sizes(num_samples: int, batch_size: int) -> None:
    if num_samples < 1:
        raise DataError(f"the data has {num_samples} samples; at least 1 is needed")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _checked_step(step: int) -> int:
    if step < 0:
        raise IndexError(f"steps are counted from 0, got {step}")
    return step
