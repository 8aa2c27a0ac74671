"""What to do about a step that must not be taken: skip it, go back to a checkpoint, or end the run. Bounded, each of them.

A step is refused when its loss or gradient norm is not finite, or a spike (`tameformer.health.spikes`). Refused steps change
nothing, so that what the next ones say is worth more: a loss that stays high on other data, with unchanged weights, tells
that the weights are bad, and going back is the remedy (as for PaLM, Chowdhery et al. 2022, arXiv:2204.02311, section 5.1:
restart about 100 steps earlier and pass over the data seen around the spike). Gradients that stay large while the loss does
not tell of a new level, not of bad weights: clipping takes care of them, and the guard gives way.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tameformer.health.spikes import SpikeWindow
from tameformer.health.verdicts import Verdict, number

Kind = Literal["non_finite", "loss_spike", "gradient_spike"]
Do = Literal["go_on", "roll_back", "stop"]
_BY_HEART = 0.1
"""Share of its largest median from which on a loss tells of data that have been learned by heart."""
_ADVICE: Mapping[Kind, str] = {
    "non_finite": "Look at the data of this step, and try a lower optim.peak_lr or a longer warm-up.",
    "loss_spike": "Try a lower optim.peak_lr, a longer warm-up, QK-norm or sigmaReparam.",
    "gradient_spike": "Try a lower optim.max_grad_norm, or a smaller second beta of Adam.",
}


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When steps are refused, and what follows when many are."""

    spike_threshold: float | None = 10.0
    """Robust standard deviations above the median from which a loss or a gradient norm is a spike; null knows no spikes."""
    grad_norm_ratio: float = 4.0
    """Times the median that a gradient norm must be, too, to be a spike. A gradient four times as large as others that point
    anywhere doubles the update of Adam with a first beta of 0.9; a smaller one is ordinary, however even the norms are."""
    window: int = 128
    """Steps that spikes are measured against, and within which skipped steps are counted."""
    min_values: int = 64
    """Steps before the first spike can be told."""
    max_skips: int = 8
    """Steps skipped within the window; one more, and the run goes back to a checkpoint."""
    max_rollbacks: int = 3
    """Times that a run goes back; then it ends with exit code 3. 0 ends it instead of going back."""
    healthy_steps: int = 10
    """Steps without trouble that must follow a checkpoint for it to be gone back to."""
    rollback_rate: float = 0.5
    """Factor on the learning rate each time that the run goes back."""

    def __post_init__(self) -> None:
        if self.spike_threshold is not None and not self.spike_threshold > 0:
            raise ValueError(
                f"guard.spike_threshold must be positive, got {self.spike_threshold}; null switches spikes off"
            )
        if not self.grad_norm_ratio >= 1:
            raise ValueError(
                f"guard.grad_norm_ratio must be at least 1, got {self.grad_norm_ratio}; 1 leaves it to guard.spike_threshold"
            )
        for name, least in (
            ("window", 1),
            ("min_values", 1),
            ("max_skips", 0),
            ("max_rollbacks", 0),
            ("healthy_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"guard.{name} must be at least {least}, got {getattr(self, name)}")
        if self.min_values > self.window:
            raise ValueError(
                f"guard.min_values must be at most guard.window, got {self.min_values} and {self.window}: "
                f"no spike would ever be told"
            )
        if not 0 < self.rollback_rate <= 1:
            raise ValueError(f"guard.rollback_rate must lie in (0, 1], got {self.rollback_rate}")


@dataclass(frozen=True)
class Answer:
    """What is to be done, and why."""

    do: Do
    kind: str
    """`step_skipped`, `guard_yields`, `rollback` or `diverged`, as events are called."""
    verdict: Verdict
    kept_from: int
    """The last step whose checkpoint is beyond doubt."""

    @property
    def message(self) -> str:
        """The verdict in words."""
        return str(self.verdict)

    @property
    def details(self) -> dict[str, Any]:
        """The verdict in values."""
        return {
            "quantity": self.verdict.quantity,
            "value": self.verdict.value,
            "since": self.verdict.since,
            "confidence": self.verdict.confidence,
        }


class Policy:
    """Decides over the steps of one run, from loss and gradient norm alone: equal numbers, equal decisions.

    Args:
        config: The bounds.

    Example:
        >>> policy = Policy(GuardConfig(max_skips=1, max_rollbacks=0))
        >>> policy.observe(1, 2.5, 1.0, taken=True)
        >>> print(policy.observe(2, math.nan, 1.0, taken=False).message)
        Step 2 was skipped: the loss is nan. Look at the data of this step, and try a lower optim.peak_lr or a longer warm-up.
        >>> policy.observe(3, math.nan, 1.0, taken=False).do
        'stop'
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig()
        threshold, size, least = self.config.spike_threshold, self.config.window, self.config.min_values
        self._loss = SpikeWindow(threshold=threshold, size=size, min_values=least, by_heart=_BY_HEART)
        self._norm = SpikeWindow(threshold=threshold, size=size, min_values=least, ratio=self.config.grad_norm_ratio)
        self._skips: list[tuple[int, Kind]] = []
        self.rollbacks = 0
        self._what_last = ""

    @property
    def rate_factor(self) -> float:
        """Factor on the learning rate after the rollbacks so far."""
        return self.config.rollback_rate**self.rollbacks

    def limits(self) -> tuple[float, float]:
        """The largest loss and the largest gradient norm with which a step is taken."""
        return self._loss.limit(), self._norm.limit()

    def observe(self, step: int, loss: float, norm: float, *, taken: bool, places: Sequence[str] = ()) -> Answer | None:
        """Learn from a step, and say what to do when it was not taken.

        Args:
            step: Its number.
            loss: Mean per target.
            norm: Of the gradient, before clipping.
            taken: Whether it was within the limits.
            places: Parameters whose gradient is not finite, where that is known.
        """
        if taken:
            self._loss.add(loss)
            self._norm.add(norm)
            return None
        kind = self._kind(loss, norm)
        self._skips = [skip for skip in self._skips if skip[0] > step - self.config.window] + [(step, kind)]
        return self._answer(step, kind, loss, norm, places)

    def conclude(self, step: int) -> Answer | None:
        """What to do about a run whose last step this is: with its last two refused it has not come to an end.

        One bad batch at the end is no harm; that a second one cannot be learned from either tells of bad weights.
        """
        if [number for number, _ in self._skips[-2:]] != [step - 1, step]:
            return None
        count = sum(number >= self._since() for number, _ in self._skips)
        steps = f"{count} of the last {step - self._since() + 1} steps"
        text = f"{steps} could not be taken, the last two among them: {self._what_last}."
        kind = self._skips[-1][1]
        verdict = Verdict("bad", "loss", (), math.nan, text, _ADVICE[kind], self._since())
        return self._way_back(verdict, self.horizon(step))

    def horizon(self, step: int) -> int:
        """The last step whose checkpoint is beyond doubt, seen from `step`: some without trouble have followed it."""
        healthy = self.config.healthy_steps
        is_troubled = bool(self._skips) and step - self._skips[-1][0] < healthy
        return (self._since() - 1 if is_troubled else step) - healthy

    def _since(self) -> int:
        """The step that the present trouble began with."""
        since = self._skips[-1][0]
        for step, _ in reversed(self._skips):
            if since - step > self.config.healthy_steps:
                break
            since = step
        return since

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "loss": self._loss.state(),
            "norm": self._norm.state(),
            "skips": [list(skip) for skip in self._skips],
            "rollbacks": self.rollbacks,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with the same decisions."""
        self._loss.load(state["loss"])
        self._norm.load(state["norm"])
        self._skips = [(step, kind) for step, kind in state["skips"]]
        self.rollbacks = state["rollbacks"]

    def rolled_back(self, lost: Mapping[str, Any]) -> None:
        """The state is that of a checkpoint again; of `lost`, the one before, the number of rollbacks counts on.

        Steps skipped before the checkpoint do not count any more: the rest of bad data that begins there may be as long as
        any other before the run goes back once more.
        """
        self.rollbacks = lost["rollbacks"] + 1
        self._skips.clear()

    def _kind(self, loss: float, norm: float) -> Kind:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "non_finite"
        return "loss_spike" if loss > self._loss.limit() else "gradient_spike"

    def _answer(self, step: int, kind: Kind, loss: float, norm: float, places: Sequence[str]) -> Answer:
        since, horizon = self._since(), self.horizon(step)
        what = self._what_last = self._what(kind, loss, norm, places)
        if len(self._skips) <= self.config.max_skips:
            verdict = self._verdict(kind, loss, norm, places, since, f"Step {step} was skipped: {what}.")
            return Answer("go_on", "step_skipped", verdict, horizon)
        within = step - self._skips[0][0] + 1
        counted = f"{len(self._skips)} of the last {within} steps could not be taken, last step {step}: {what}."
        harmless = sum(each == "gradient_spike" for _, each in self._skips)
        if 2 * harmless > len(self._skips):
            text = f"{counted} The loss is in order, so larger gradients are taken from here on."
            verdict = self._verdict("gradient_spike", loss, norm, places, since, text)
            self._skips.clear()
            self._norm.clear()
            return Answer("go_on", "guard_yields", verdict, horizon)
        verdict = self._verdict(kind, loss, norm, places, since, counted)
        return self._way_back(verdict, horizon)

    def _way_back(self, verdict: Verdict, horizon: int) -> Answer:
        if self.rollbacks < self.config.max_rollbacks:
            return Answer("roll_back", "rollback", verdict, horizon)
        return Answer("stop", "diverged", verdict, horizon)

    def _verdict(self, kind: Kind, loss: float, norm: float, places: Sequence[str], since: int, text: str) -> Verdict:
        of_norm = kind == "gradient_spike" or (kind == "non_finite" and math.isfinite(loss))
        return Verdict(
            "bad", "grad_norm" if of_norm else "loss", tuple((place, ()) for place in places), norm if of_norm else loss,
            text, _ADVICE[kind], since, "certain" if kind == "non_finite" else "likely",
        )  # fmt: skip

    def _what(self, kind: Kind, loss: float, norm: float, places: Sequence[str]) -> str:
        if kind == "non_finite":
            if not math.isfinite(loss):
                return f"the loss is {loss}"
            return f"the gradient norm is {norm}{_where(places)}"
        window, value, name = (
            (self._loss, loss, "loss") if kind == "loss_spike" else (self._norm, norm, "gradient norm")
        )
        usual = number(window.middle() or 0.0)
        return f"the {name} is {number(value)}, above {number(window.limit())}, where {usual} was usual"


def _where(places: Sequence[str]) -> str:
    if not places:
        return ""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return f", from the gradient of {', '.join(places[:3])}{more}"
