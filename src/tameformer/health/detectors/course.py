"""The training loss as it comes: smoothed, against its lowest so far.

The report judges the same afterwards, with a mean that looks both ways (`tameformer.report.loss`); the limits are its own.
"""

import math
from collections.abc import Mapping
from typing import Any

from tameformer.limits import LOSS_CLEAR, LOSS_HIGH

_DECAY, _SLOW = 0.8, 0.9
_NORMAL = 1.128  # mean jump between two values of a normal variable over its standard deviation
_FEWEST = 12  # lines below which a course cannot be told from noise


class LossCourse:
    """Follows one loss.

    Example:
        >>> course = LossCourse()
        >>> for step, loss in enumerate([2.0] * 5 + [1.0] * 20 + [1.8] * 8):
        ...     course.add(step, loss)
        >>> course.risen_since
        25
    """

    def __init__(self) -> None:
        self.smooth: float | None = None
        """The loss without most of its noise."""
        self.risen_since: int | None = None
        """The step since which the loss is clearly above its lowest, when it is well above it now."""
        self._count, self._noise, self._first, self._last, self._lowest = 0, 0.0, 0.0, 0.0, math.inf
        self._clear_since: int | None = None

    def add(self, step: int, value: float) -> None:
        """Take in the loss of a line; what is not finite is passed over."""
        if not math.isfinite(value):
            return
        if self.smooth is None:
            self.smooth = self._first = self._last = value
        self._count += 1
        self._noise += (1 - _SLOW) * (abs(value - self._last) / _NORMAL - self._noise)
        self._last = value
        self.smooth += (1 - _DECAY) * (value - self.smooth)
        self._lowest = min(self._lowest, self.smooth)
        least = max(self._noise, 0.02 * abs(self._lowest))
        fall, rise = self._first - self._lowest, self.smooth - self._lowest
        is_clear = rise > max(LOSS_CLEAR * fall, least)
        self._clear_since = (self._clear_since if self._clear_since is not None else step) if is_clear else None
        is_high = self._count >= _FEWEST and rise > max(LOSS_HIGH * fall, 3 * least)
        if is_high or not is_clear:
            self.risen_since = self._clear_since

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        lowest = self._lowest if self._count else None
        return {
            "smooth": self.smooth, "risen_since": self.risen_since, "clear_since": self._clear_since,
            "count": self._count, "noise": self._noise, "first": self._first, "last": self._last, "lowest": lowest,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self.smooth, self.risen_since, self._clear_since = state["smooth"], state["risen_since"], state["clear_since"]
        self._count, self._noise = state["count"], state["noise"]
        self._first, self._last = state["first"], state["last"]
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
