"""The course of the training loss: smoothed without lag, and the step at which it goes."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from tameformer.limits import LOSS_CLEAR, LOSS_HIGH, LOSS_STALLED
from tameformer.report.read import Series

LONG = 0.2  # chosen here: of the records; a loss that is high for so long did not merely spike
FEWEST = 12  # chosen here: records below which a course cannot be told from noise


@dataclass(frozen=True)
class Departure:
    """Where the training loss left its course, and how."""

    step: int
    """The first step at which the loss is clearly above its lowest value, or not finite."""
    how: Literal["broke", "rose", "rose and came back", "stalled"]
    back: int | None = None
    """The step at which a loss that came back was down again."""

    @property
    def words(self) -> str:
        """A clause such as `the loss rose`."""
        return {"broke": "the loss broke", "stalled": "the loss stopped falling"}.get(self.how, "the loss rose")


def departure(loss: Series) -> Departure | None:
    """Where the loss went for good, or for a long while; None for a loss that keeps its course.

    In this order: it is not finite up to the last record; its smoothed finite values stay clearly above their lowest so
    far, up to the last record or for a fifth of them; it was not finite in between. A loss that merely stops falling
    keeps its course: see `stall`.

    Example:
        >>> rising = np.concatenate([np.linspace(2, 1, 50), np.full(50, 1.8)])
        >>> departure(Series(np.arange(100), rising)).how
        'rose'
    """
    broken = loss.non_finite_steps
    if len(broken) and not np.isfinite(loss.values[-1]):
        last = int(loss.finite.steps[-1]) if len(loss.finite) else -1
        ended = Departure(int(broken[broken > last][0]), "broke")
        risen = _rise(loss.finite)
        return risen if risen is not None and risen.how == "rose" and risen.step < ended.step else ended
    risen = _rise(loss.finite)
    if risen is None and len(broken):
        return Departure(int(broken[0]), "broke")
    return risen


def stall(loss: Series) -> Departure | None:
    """Where a loss that hardly fell after its first tenth stopped falling; None for one that learns, or is too short.

    That is no trouble by itself: a fine-tuned model may start where it ends. It is, when the probes say why.
    """
    finite = loss.finite
    if len(finite) < FEWEST:
        return None
    smooth = smoothed(finite).values
    early = len(finite) // 10
    lowest = float(smooth.min())
    if smooth[early] - lowest > LOSS_STALLED * max(abs(float(smooth[early])), 1e-12):
        return None
    return Departure(int(finite.steps[early]), "stalled")


def smoothed(series: Series) -> Series:
    """Centred, triangular moving mean over about a fifteenth of the points, so no lag; short series as they are.

    The values must be finite.
    """
    half = len(series) // 30
    if len(series) < 12:
        return series
    kernel = np.bartlett(2 * max(1, half) + 3)
    total = np.convolve(series.values, kernel, "same")
    return Series(series.steps, total / np.convolve(np.ones(len(series)), kernel, "same"))


def _rise(finite: Series) -> Departure | None:
    """The rise of a finite loss above its lowest so far, for good or for long; of several the last for good."""
    if len(finite) < FEWEST:
        return None
    smooth = smoothed(finite).values
    lowest = np.minimum.accumulate(smooth)
    fall = np.maximum.accumulate(smooth[0] - lowest)
    noise = 1.4826 * float(np.median(np.abs(finite.values - smooth)))
    least = np.maximum(noise, 0.02 * np.abs(lowest))  # a loss that has not fallen yet still jitters
    clear = smooth > lowest + np.maximum(LOSS_CLEAR * fall, least)
    high = smooth > lowest + np.maximum(LOSS_HIGH * fall, 3 * least)
    found = None
    for start, stop in _stretches(clear):
        if not high[start:stop].any():
            continue
        if stop == len(smooth):
            return Departure(int(finite.steps[start]), "rose") if high[-1] or high[start:].mean() > 0.5 else found
        if found is None and stop - start >= LONG * len(smooth):
            found = Departure(int(finite.steps[start]), "rose and came back", int(finite.steps[stop]))
    return found


def _stretches(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and end (exclusive) of each unbroken run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]
