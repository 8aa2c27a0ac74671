"""Spikes of one quantity: values far above what the last steps had, told by median and MAD.

A value is a spike when it lies more than `threshold` robust standard deviations (1.4826 times the median absolute deviation,
Rousseeuw and Croux 1993) above the median of the window, above it by a tenth of the largest median so far, and more than
`ratio` times the median. Where the median has fallen to the share `by_heart` of the largest, it must rise by all of that.

Window, order of the threshold and the 64 values to wait for come from OLMo-core's skip step (mean and standard deviation,
128 values, 6 of them); median and MAD, the tenth, and 10 are chosen here. Mean and deviation are moved by the spikes
themselves; the tenth keeps a batch that is harder than the others from being a spike where losses are nearly even; the ratio
keeps quantities that hardly vary, as the gradient norms of recurrent networks, from having a spike at twice their median. The
last rule is for losses of runs that have learned their data by heart: most are near 0, and one hard text among 16 is far above
them. Of five such runs, all in order, five had been ended; weights that break give more than what the run began with. Only
values of steps that were taken enter the window, so neither a spike nor NaN can move the limit.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_NORMAL = 1.4826  # standard deviation of a normal variable over its median absolute deviation
_LEAST_RISE = 0.1
_EVERY = 8  # values between two looks at the window: a limit that moves this slowly need not be computed at each step


def spike_limit(
    values: Sequence[float], *, threshold: float, top: float = 0.0, ratio: float = 1.0, by_heart: float = 0.0
) -> float:
    """The largest value that is no spike after these.

    Args:
        values: Finite, at least one.
        threshold: In robust standard deviations.
        top: The largest median so far, whose tenth is the least rise of a spike.
        ratio: Times the median that a spike is at least.
        by_heart: Share of `top` from which on, for a median, all of `top` is the least rise.

    Example:
        >>> spike_limit([1.0, 2.0, 3.0], threshold=10.0)
        16.826
        >>> spike_limit([1.0, 1.0, 1.0], threshold=10.0, top=5.0)
        1.5
        >>> spike_limit([0.1, 0.1, 0.1], threshold=10.0, top=5.0, by_heart=0.1)
        5.1
        >>> spike_limit([1.0, 1.0, 1.0], threshold=10.0, ratio=4.0)
        4.0
    """
    middle = median(values)
    deviation = _NORMAL * median(abs(value - middle) for value in values)
    top = max(abs(top), abs(middle))
    rise = max(top if abs(middle) <= by_heart * top else _LEAST_RISE * top, (ratio - 1) * abs(middle))
    return middle + max(threshold * deviation, rise)


class SpikeWindow:
    """The last values of one quantity, and the limit that follows from them.

    Args:
        threshold: In robust standard deviations; None knows no spikes.
        size: Values remembered.
        min_values: Values it takes before it speaks.
        ratio: Times the median that a spike is at least.
        by_heart: Share of the largest median from which on all of that is the least rise.

    Example:
        >>> window = SpikeWindow(threshold=10.0, size=4, min_values=2)
        >>> for value in (1.0, 1.1, 0.9, 1.0):
        ...     window.add(value)
        >>> window.limit() < 5.0
        True
    """

    def __init__(
        self,
        *,
        threshold: float | None = 10.0,
        size: int = 128,
        min_values: int = 64,
        ratio: float = 1.0,
        by_heart: float = 0.0,
    ) -> None:
        self.threshold, self.size, self.min_values = threshold, size, min_values
        self.ratio, self.by_heart = ratio, by_heart
        self.clear()

    def clear(self) -> None:
        """Forget everything: what follows is a new level."""
        self._values: list[float] = []
        self._count, self._top, self._limit = 0, 0.0, math.inf

    def add(self, value: float) -> None:
        """Take in the value of a step that was taken; what is not finite is passed over."""
        if self.threshold is None or not math.isfinite(value):
            return
        self._values = [*self._values, value][-self.size :]
        self._count += 1
        known = len(self._values) >= min(self.min_values, self.size)
        if known and (self._limit == math.inf or self._count % _EVERY == 0):
            self._top = max(self._top, abs(median(self._values)))
            self._limit = spike_limit(
                self._values, threshold=self.threshold, top=self._top, ratio=self.ratio, by_heart=self.by_heart
            )

    def limit(self) -> float:
        """The largest value that is no spike; infinity while too little is known."""
        return self._limit

    def middle(self) -> float | None:
        """The median of the window, or None before the first value."""
        return median(self._values) if self._values else None

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        limit = None if math.isinf(self._limit) else self._limit
        return {"values": self._values, "count": self._count, "top": self._top, "limit": limit}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, to the same bits."""
        self._values, self._count, self._top = list(state["values"]), state["count"], state["top"]
        self._limit = math.inf if state["limit"] is None else state["limit"]
