"""Time that a step spends waiting for its data."""

from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, finite
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, number

_LINES, _STEPS = 5, 100  # chosen here: workers that start, and a busy moment, are no bottleneck


class DataWait(Detector):
    """`perf/data_wait`, the share of the time, is above a limit in five lines of the log in a row, and for a hundred steps.

    Times belong to the machine and not to the run: they are in no checkpoint, and a run that goes on looks afresh.

    Args:
        above: The limit; half of it is in order again.

    Example:
        >>> detector = DataWait()
        >>> verdicts = [detector.observe(step, {"perf/data_wait": 0.6}) for step in range(10, 120, 10)]
        >>> print(verdicts[-1].text)
        Steps wait for their data 60 % of the time since step 10.
    """

    name = "data_wait"

    def __init__(self, above: float = 0.25) -> None:
        self.above = above
        self._episodes, self._told = Episodes(patience=_LINES), False

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as it lasts."""
        share = finite(values, "perf/data_wait")
        if share is None:
            return None
        beyond, in_order = share > self.above, share < 0.5 * self.above
        self._episodes.note(step, beyond=[""] * beyond, in_order=[""] * in_order)
        found = self._episodes.open()
        if not found or self._told or step - found[""] < _STEPS:
            self._told = self._told and bool(found)
            return None
        self._told = True
        return Verdict(
            "note", "data_wait", (), share,
            f"Steps wait for their data {number(100 * share)} % of the time since step {found['']}.",
            "Raise data.num_workers, prepare the data once, or use faster storage.", found[""],
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Nothing: see above."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Nothing: see above."""
