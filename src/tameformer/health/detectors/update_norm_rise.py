"""Updates that grow although the learning rate does not.

The norm of Adam's update doubled before loss and gradient norm spiked in a 32B model (marin-community/marin #1368): the first
moment had doubled while the second had not followed. What is compared is the update over the learning rate, so that a warm-up
is no rise, root mean square over the weights, against the median of the measurements before.
"""

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

from tameformer.health.detectors.detector import Detector, finite, of_quantity
from tameformer.health.spikes import spike_limit
from tameformer.health.verdicts import Verdict, by_layer, number, place_of, where

_WINDOW, _FEWEST = 16, 4  # measurements compared with, and those it takes before one is judged
_NOISE = 10.0  # robust standard deviations that a rise must have besides, the guard's
_ROUNDING = 1e-6  # updates that are smaller relative to their weights are cut by float32's last digit
_LEVEL = 4  # measurements in a row after which what was a rise is the usual size


class UpdateNormRise(Detector):
    """The joint size of the updates relative to the weights is a multiple of what was usual.

    Args:
        factor: The multiple.

    Example:
        >>> detector, rate = UpdateNormRise(), {"train/lr": 0.1}
        >>> for step in range(10, 60, 10):
        ...     detector.observe(step, {"diag/update_ratio/up": 1e-3, "diag/update_ratio/down": 1e-3, **rate})
        >>> found = detector.observe(60, {"diag/update_ratio/up": 4e-3, "diag/update_ratio/down": 1e-3, **rate})
        >>> print(found.text)
        Updates are 2.92 times as large as usual at this learning rate since step 60, most of all in up.
    """

    name = "update_norm_rise"

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self._sizes: list[float] = []
        self._usual: dict[str, float] = {}
        self._risen = 0

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as they rise; over when they are back, or have stayed so large that this is the usual size."""
        ratios, rate = of_quantity(values, "update_ratio"), finite(values, "train/lr")
        if not ratios or not rate:
            return None
        relative = {place: ratio / rate for place, ratio in ratios.items()}
        size = math.sqrt(math.fsum(value * value for value in relative.values()) / len(relative))
        if size * rate < _ROUNDING or not math.isfinite(size):  # no rate is too small to be logged, but to divide by
            return None
        usual = median(self._sizes) if len(self._sizes) >= _FEWEST else math.inf
        if size > self._limit():
            self._risen += 1
            if self._risen == 1:
                return self._verdict(step, size / usual, relative)
            if self._risen < _LEVEL:
                return None
            self._sizes.clear()
        self._risen = 0
        self._sizes = [*self._sizes, size][-_WINDOW:]
        for place, value in relative.items():
            self._usual[place] = 0.5 * (self._usual.get(place, value) + value)
        return None

    def _limit(self) -> float:
        if len(self._sizes) < _FEWEST:
            return math.inf
        return max(self.factor * median(self._sizes), spike_limit(self._sizes, threshold=_NOISE))

    def _verdict(self, step: int, times: float, relative: Mapping[str, float]) -> Verdict:
        growth = {place: value / self._usual[place] for place, value in relative.items() if self._usual.get(place)}
        largest = sorted(growth, key=lambda place: -growth[place])[:3]
        places = by_layer(place_of(place) for place in largest if growth[place] > 1.5)
        most = f", most of all in {where(places)}" if places else ""
        return Verdict(
            "bad", "update_ratio", places, times,
            f"Updates are {number(times)} times as large as usual at this learning rate since step {step}{most}.",
            "Loss and gradient may spike next: try a smaller second beta of Adam (0.95), or a lower optim.peak_lr.", step,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"sizes": self._sizes, "usual": self._usual, "risen": self._risen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._sizes, self._usual = list(state["sizes"]), dict(state["usual"])
        self._risen = state["risen"]
