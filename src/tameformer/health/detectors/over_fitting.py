"""Over-fitting: the evaluation loss rises while the training loss goes on falling."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from tameformer.health.detectors.course import LossCourse
from tameformer.health.detectors.detector import Detector, finite
from tameformer.health.verdicts import Verdict, number
from tameformer.limits import LOSS_CLEAR, OVER_FITTING_RISE

_LAST = 3  # evaluations whose median is compared, so that one alone is neither the best nor a rise
_NOISE = 2.5  # mean bends of the curve that a rise must have besides, about five standard deviations; chosen here


class OverFitting(Detector):
    """The median of three evaluation losses is clearly above its lowest, and the training loss below what it was then.

    Clearly: by a share of the lowest, by a twentieth of the fall so far, and by more than the noise, which is told by how much
    each evaluation lies off the line through its neighbours: a steady rise is none.

    Args:
        rise: The share, which the training loss must have fallen by, too.

    Example:
        >>> detector, verdicts = OverFitting(), []
        >>> for step, (train, held_out) in enumerate([(3, 3), (2, 2), (1, 1), (1, 1), (0.8, 1), (0.5, 2), (0.2, 3), (0.1, 4)]):
        ...     verdicts += [detector.observe(step, {"train/loss": train}), detector.observe(step, {"eval/loss": held_out})]
        >>> [verdict.text.partition(" while")[0] for verdict in verdicts if verdict]
        ['The evaluation loss has risen from 1 to 2 since step 3']
    """

    name = "over_fitting"

    def __init__(self, rise: float = OVER_FITTING_RISE) -> None:
        self.rise = rise
        self._course = LossCourse()
        self._last: list[float] = []
        self._first = 0.0
        self._bend: float | None = None
        self._best: list[float] | None = None  # step, median, training loss
        self._told = False

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as it begins; over when the evaluation loss has a new lowest median."""
        loss, held_out = finite(values, "train/loss"), finite(values, "eval/loss")
        if loss is not None:
            self._course.add(step, loss)
        if held_out is None:
            return None
        if not self._last:
            self._first = held_out
        self._last = [*self._last, held_out][-_LAST:]
        now = self._course.smooth
        if len(self._last) < _LAST or now is None:
            return None
        bend = abs(self._last[0] - 2 * self._last[1] + self._last[2])
        self._bend = bend if self._bend is None else 0.7 * self._bend + 0.3 * bend
        middle = median(self._last)
        if self._best is None or middle < self._best[1]:
            self._best, self._told = [step, middle, now], False
            return None
        since, lowest, then = self._best
        least = max(self.rise * abs(lowest), LOSS_CLEAR * (self._first - lowest), _NOISE * self._bend)
        if self._told or middle - lowest <= least or then - now <= self.rise * abs(then):
            return None
        self._told = True
        return Verdict(
            "note", "eval/loss", (), middle,
            f"The evaluation loss has risen from {number(lowest)} to {number(middle)} since step {int(since)} while the "
            f"training loss fell from {number(then)} to {number(now)}: over-fitting.",
            "The best checkpoint is kept; try loop.early_stopping_patience, more data or augmentation, dropout, weight decay.",
            int(since),
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "course": self._course.state(), "last": self._last, "first": self._first, "bend": self._bend,
            "best": self._best, "told": self._told,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._course.load(state["course"])
        self._last, self._first, self._bend = list(state["last"]), state["first"], state["bend"]
        self._best, self._told = state["best"] and list(state["best"]), state["told"]
