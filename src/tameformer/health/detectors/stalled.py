"""A model that has learned nothing: its loss is that of the trivial predictor, who gives every class its frequency."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tameformer.health.detectors.course import LossCourse
from tameformer.health.detectors.detector import Detector, finite
from tameformer.health.verdicts import Verdict, number
from tameformer.limits import LOSS_STALLED


def prior_loss(counts: Sequence[float], *, label_smoothing: float = 0.0) -> float:
    """Cross-entropy, in nats, of always predicting the frequencies: the entropy of the (smoothed) labels.

    Example:
        >>> round(prior_loss([5, 5]), 4), prior_loss([5, 0])
        (0.6931, 0.0)
    """
    total = math.fsum(counts)
    shares = [(1 - label_smoothing) * count / total + label_smoothing / len(counts) for count in counts]
    return math.fsum(-share * math.log(share) for share in shares if share)


class Stalled(Detector):
    """The smoothed training loss is no better than the trivial predictor's, after steps enough to learn something.

    Args:
        trivial_loss: The trivial predictor's; None judges nothing.
        after: Steps before it is judged.
        share: Of the trivial loss, above which a loss is no better; half as far below it counts as learning again.

    Example:
        >>> detector = Stalled(math.log(10), after=100)
        >>> detector.observe(99, {"train/loss": 2.3})
        >>> print(detector.observe(100, {"train/loss": 2.3}).text)
        The training loss is 2.3 at step 100: no better than giving every class its frequency (2.3).
    """

    name = "stalled"

    def __init__(self, trivial_loss: float | None = None, *, after: int = 200, share: float = 1 - LOSS_STALLED) -> None:
        self.trivial_loss, self.after, self.share = trivial_loss, after, share
        self._course, self._told = LossCourse(), False

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict when nothing is learned; again when what was learned is lost."""
        loss, trivial = finite(values, "train/loss"), self.trivial_loss
        if loss is None or trivial is None:
            return None
        self._course.add(step, loss)
        smooth = self._course.smooth
        assert smooth is not None, "a finite loss was added"
        if smooth < (2 * self.share - 1) * trivial:
            self._told = False
        if self._told or step < self.after or smooth <= self.share * trivial:
            return None
        self._told = True
        return Verdict(
            "bad", "loss", (), smooth,
            f"The training loss is {number(smooth)} at step {step}: no better than giving every class its frequency "
            f"({number(trivial)}).",
            "Check labels and input against each other, try --overfit_batches 1, then another optim.peak_lr.", step,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"course": self._course.state(), "told": self._told}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._course.load(state["course"])
        self._told = state["told"]
