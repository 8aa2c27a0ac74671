"""Batches of one size whose samples are of about the same length, so that little is padding."""

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.plans import ShuffledBatches
from tameformer.data.randomness import permutation
from tameformer.shapes import Int64


class LengthBuckets(ShuffledBatches):
    """Every epoch in a new order that depends on (seed, epoch) only, of which each `pool` batches are sorted by length.

    Within a pool of samples drawn at random the batches are cut by length and come in random order: the larger the pool, the
    less padding, and the more alike the lengths of a step. The ragged tail of an epoch is dropped.

    Example:
        >>> plan = LengthBuckets(np.array([9, 1, 8, 2]), batch_size=2, seed=0, pool=2)
        >>> sorted(sorted(plan.batch(step).indices.tolist()) for step in range(2))
        [[0, 2], [1, 3]]
    """

    def __init__(
        self, lengths: Int64[np.ndarray, " samples"], batch_size: int, seed: int = 0, *, pool: int = 16
    ) -> None:
        super().__init__(len(lengths), batch_size, seed)
        if pool < 1:
            raise ValueError(f"pool must be at least 1 batch, got {pool}; 1 does not sort")
        self._lengths, self.pool = lengths, pool
        self._planned: tuple[int, np.ndarray] | None = None

    def batch(self, step: int) -> SampleKeys:
        """The samples of this optimizer step."""
        epoch, place = self.locate(step)
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._epoch(epoch)
        return SampleKeys(self.seed, epoch, self._planned[1][place])

    def _epoch(self, epoch: int) -> Int64[np.ndarray, "steps batch"]:
        order = permutation(self.num_samples, seed=self.seed, epoch=epoch, salt="order")
        steps = self.steps_in_epoch(epoch)
        batches = []
        for begin in range(0, steps * self.batch_size, self.pool * self.batch_size):
            drawn = order[begin : min(begin + self.pool * self.batch_size, steps * self.batch_size)]
            drawn = drawn[np.argsort(self._lengths[drawn], kind="stable")]
            batches.append(drawn.reshape(-1, self.batch_size))
        planned = np.concatenate(batches)
        return planned[permutation(len(planned), seed=self.seed, epoch=epoch, salt="bucket order")]
