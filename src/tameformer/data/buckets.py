"""Batches of about equally long samples with a bound on padded tokens, so that little is padding and memory is even.

The order of batches is random and so is their composition, but samples of very different length never meet: a step sees
fewer lengths than with random batches, and the number of samples varies from step to step, so losses must be sums.
"""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.plans import Plan
from tameformer.data.randomness import permutation, uniforms
from tameformer.errors import DataError
from tameformer.shapes import Int64, Integer


class TokenBuckets:
    """A plan of training: each epoch every sample once, in batches of at most `max_tokens` padded tokens.

    In an epoch samples are sorted by their longer side plus noise, cut greedily, and the batches shuffled: a pure
    function of (seed, epoch). The number of batches may differ a little between epochs, so `locate` plans all epochs
    up to the one it is asked for, once.

    Example:
        >>> plan = TokenBuckets(np.array([[3, 4], [9, 9], [4, 3], [8, 9]]), max_tokens=40, seed=0)
        >>> sorted(sorted(plan.batch(step).indices.tolist()) for step in range(plan.steps_in_epoch(0)))
        [[0, 2], [1, 3]]
    """

    def __init__(
        self,
        lengths: Integer[np.ndarray, " samples"] | Integer[np.ndarray, "samples sides"] | Callable[[int], np.ndarray],
        max_tokens: int,
        seed: int,
        *,
        min_batch_size: int = 1,
        noise: float = 1.0,
    ):
        """Plan batches over samples of known lengths.

        Args:
            lengths: Tokens of each sample, or of each of its sides (source, target), which are padded apart; or a function from
                the epoch to them, for samples that are made anew in every epoch.
            max_tokens: Bound on the padded tokens of a batch, all sides together.
            seed: Data seed.
            min_batch_size: Fewest samples in a batch: processes x accumulation, so that each has one.
            noise: Tokens of noise on the sort key: 1 shuffles equal lengths only, more mixes lengths and pads more.

        Raises:
            DataError: No sample, fewer than `min_batch_size`, or `max_tokens` cannot hold that many of the longest.
        """
        self._lengths = lengths if callable(lengths) else lambda epoch: lengths
        _check_fits(_two_axes(self._lengths(0)), max_tokens, min_batch_size)
        if noise < 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.max_tokens, self.min_batch_size, self.seed, self.noise = max_tokens, min_batch_size, seed, noise
        self._first_steps = [0]  # of each epoch planned so far, and of the one after
        self._planned: tuple[int, list[Int64[np.ndarray, " batch"]]] | None = None  # the epoch planned last

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches of this epoch."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def first_step(self, epoch: int) -> int:
        """The step an epoch begins with."""
        while len(self._first_steps) <= epoch:
            self._first_steps.append(self._first_steps[-1] + len(self._batches(len(self._first_steps) - 1)))
        return self._first_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch and step within it."""
        if step < 0:
            raise IndexError(f"steps are counted from 0, got {step}")
        while self._first_steps[-1] <= step:
            self.first_step(len(self._first_steps))
        epoch = bisect_right(self._first_steps, step) - 1
        return epoch, step - self._first_steps[epoch]

    def batch(self, step: int) -> SampleKeys:
        """The samples of this optimizer step, shorter ones first."""
        epoch, place = self.locate(step)
        return SampleKeys(self.seed, epoch, self._batches(epoch)[place])

    def _batches(self, epoch: int) -> list[Int64[np.ndarray, " batch"]]:
        """All batches of an epoch in their order."""
        if self._planned is None or self._planned[0] != epoch:
            lengths = _two_axes(self._lengths(epoch))
            _check_fits(lengths, self.max_tokens, self.min_batch_size)
            samples = SampleKeys(self.seed, epoch, np.arange(len(lengths), dtype=np.int64))
            draws = uniforms(samples, 1, "bucket")[:, 0]
            order = np.argsort(lengths.max(axis=1) + self.noise * draws, kind="stable")
            bounds = _cut(lengths[order], self.max_tokens, self.min_batch_size)
            cut = np.split(order, bounds[1:-1])
            shuffled = permutation(len(cut), seed=self.seed, epoch=epoch, salt="bucket order")
            self._planned = epoch, [cut[place] for place in shuffled]
        return self._planned[1]


class LengthSortedBatches:
    """One pass over all samples from short to long, at most `max_tokens` padded tokens a batch: for evaluation."""

    def __init__(
        self,
        lengths: Integer[np.ndarray, " samples"] | Integer[np.ndarray, "samples sides"],
        max_tokens: int,
        *,
        min_batch_size: int = 1,
    ):
        """Plan the pass; arguments and errors as for `TokenBuckets`."""
        sides = _two_axes(lengths)
        _check_fits(sides, max_tokens, min_batch_size)
        order = np.lexsort(sides.T)
        self._cut = np.split(order, _cut(sides[order], max_tokens, min_batch_size)[1:-1])

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches of the pass."""
        return len(self._cut)

    def locate(self, step: int) -> tuple[int, int]:
        """Always epoch 0.

        Raises:
            IndexError: The pass has no such step.
        """
        if not 0 <= step < len(self._cut):
            raise IndexError(f"step {step} lies outside the single pass of {len(self._cut)} batches")
        return 0, step

    def batch(self, step: int) -> SampleKeys:
        """The samples of one batch."""
        return SampleKeys(0, 0, self._cut[self.locate(step)[1]])


def padding_share(
    plan: Plan, lengths: Integer[np.ndarray, " samples"] | Integer[np.ndarray, "samples sides"], epoch: int = 0
) -> float:
    """Share of padding in all tokens of an epoch, each batch padded to its longest on every side; in [0, 1)."""
    sides = _two_axes(lengths)
    first = sum(plan.steps_in_epoch(earlier) for earlier in range(epoch))
    real = padded = 0
    for step in range(first, first + plan.steps_in_epoch(epoch)):
        batch = sides[plan.batch(step).indices]
        real += int(batch.sum())
        padded += len(batch) * int(batch.max(axis=0).sum())
    return 1.0 - real / padded


def _cut(lengths: np.ndarray, max_tokens: int, min_batch_size: int) -> list[int]:
    """Bounds of batches over samples in this order: each as large as `max_tokens` lets it be, and none too small."""
    bounds, window = [0], 64
    while bounds[-1] < len(lengths):
        ahead = lengths[bounds[-1] : bounds[-1] + window]
        padded = np.arange(1, len(ahead) + 1) * np.maximum.accumulate(ahead, axis=0).sum(
            axis=1
        )  # of the first 1, 2, ...
        size = int(np.searchsorted(padded, max_tokens, side="right"))
        if size == window:
            window *= 2  # all that was looked at fits: look further
        else:
            bounds.append(bounds[-1] + size)
    if len(bounds) > 2:  # a short rest takes samples from the batch before it, which `_check_fits` made large enough
        bounds[-2] = min(bounds[-2], len(lengths) - min_batch_size)
    return bounds


def _check_fits(lengths: np.ndarray, max_tokens: int, min_batch_size: int) -> None:
    """Refuse bounds that contradict each other: 2 * min_batch_size - 1 of the longest must fit.

    Then a batch was closed because it had at least that many, and can give min_batch_size - 1 to a short rest.
    """
    if min_batch_size < 1:
        raise ValueError(f"min_batch_size must be at least 1, got {min_batch_size}")
    if len(lengths) < min_batch_size:
        raise DataError(
            f"expected at least min_batch_size {min_batch_size} samples (processes x accumulation), "
            f"got {len(lengths)}: give more data, or take fewer processes or less accumulation"
        )
    longest = int(lengths.sum(axis=1).argmax())
    widest = int(lengths.max(axis=0).sum()) if min_batch_size > 1 else int(lengths[longest].sum())
    needed = (2 * min_batch_size - 1) * widest
    if max_tokens < needed:
        raise DataError(
            f"max_tokens {max_tokens} is too small: sample {longest} has {lengths[longest].tolist()} tokens, and "
            f"batches of at least {min_batch_size} need max_tokens >= {needed}: raise it, or drop longer samples"
        )


def _two_axes(lengths: np.ndarray) -> np.ndarray:
    """Lengths with one column a side."""
    if not len(lengths):
        raise DataError("expected the lengths of at least one sample, got none")
    if lengths.min() < 0 or lengths.max() < 1:
        raise ValueError(f"lengths must not be negative, nor all 0, got {lengths.min()} to {lengths.max()}")
    return lengths.reshape(len(lengths), -1)
