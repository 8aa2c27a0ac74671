"""Clipping that never stops: then the threshold, not the gradient, sets the length of every update."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tameformer.health.detectors.detector import Detector, finite
from tameformer.health.verdicts import Verdict, number
from tameformer.limits import ALWAYS_CLIPPED

_LINES = 30  # chosen here: runs in order may be clipped at each of their first two hundred steps


class ClipRate(Detector):
    """The share of steps that were clipped, over thirty lines of the log.

    Args:
        above: The share; half of it is in order again.

    Example:
        >>> detector = ClipRate()
        >>> verdicts = [detector.observe(step, {"train/clip_rate": 1.0}) for step in range(10, 310, 10)]
        >>> print(verdicts[-1].text)
        All steps were clipped since step 10: the threshold, not the gradient, sets the length of the updates.
    """

    name = "clip_rate"

    def __init__(self, above: float = ALWAYS_CLIPPED) -> None:
        self.above = above
        self._steps: list[int] = []
        self._rates: list[float] = []
        self._told = False

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict after thirty lines of clipping."""
        rate = finite(values, "train/clip_rate")
        if rate is None:
            return None
        self._steps, self._rates = [*self._steps, step][-_LINES:], [*self._rates, rate][-_LINES:]
        mean = fmean(self._rates)
        if mean < 0.5 * self.above:
            self._told = False
        if self._told or len(self._rates) < _LINES or mean <= self.above:
            return None
        self._told = True
        since = self._steps[0]
        return Verdict(
            "note", "clip_rate", (), mean,
            f"{_share(mean)} were clipped since step {since}: the threshold, not the gradient, sets the length of the updates.",
            "Raise optim.max_grad_norm, take optim.clipping adaptive, or lower the rate if the loss is unsteady.", since,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"steps": self._steps, "rates": self._rates, "told": self._told}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._steps, self._rates, self._told = list(state["steps"]), list(state["rates"]), state["told"]


def _share(mean: float) -> str:
    return "All steps" if mean == 1 else f"{number(100 * mean)} % of the steps"
