"""Clipping that never stops: then the threshold, not the gradient, sets the length of every update."""

from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, finite
from tameformer.health.verdicts import Verdict, number
from tameformer.limits import ALWAYS_CLIPPED

_FEWEST = 10  # lines of the log


class ClipRate(Detector):
    """The share of steps that were clipped since it last was below one half.

    Args:
        above: The share.
        steps: How long it must have lasted; chosen here: runs in order may be clipped at each of their first two hundred.

    Example:
        >>> detector = ClipRate()
        >>> verdicts = [detector.observe(step, {"train/clip_rate": 1.0}) for step in range(10, 320, 10)]
        >>> print(verdicts[-1].text)
        All steps were clipped since step 10: the threshold, not the gradient, sets the length of the updates.
    """

    name = "clip_rate"

    def __init__(self, above: float = ALWAYS_CLIPPED, *, steps: int = 300) -> None:
        self.above, self.steps = above, steps
        self._since, self._sum, self._count, self._told = 0, 0.0, 0, False

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict when it has lasted."""
        rate = finite(values, "train/clip_rate")
        if rate is None:
            return None
        if rate < 0.5:
            self._sum, self._count, self._told = 0.0, 0, False
            return None
        if self._count == 0:
            self._since = step
        self._sum, self._count = self._sum + rate, self._count + 1
        mean = self._sum / self._count
        if self._told or self._count < _FEWEST or step - self._since < self.steps or mean <= self.above:
            return None
        self._told = True
        share = "All steps" if mean == 1 else f"{number(100 * mean)} % of the steps"
        return Verdict(
            "note", "clip_rate", (), mean,
            f"{share} were clipped since step {self._since}: the threshold, not the gradient, sets the length of the updates.",
            "Raise optim.max_grad_norm, take optim.clipping adaptive, or lower the rate if the loss is unsteady.",
            self._since,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"since": self._since, "sum": self._sum, "count": self._count, "told": self._told}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._since, self._sum, self._count = state["since"], state["sum"], state["count"]
        self._told = state["told"]
