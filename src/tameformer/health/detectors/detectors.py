"""All detectors of a run as one object: configured, checkpointed and asked together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tameformer.health.detectors.clip_rate import ClipRate
from tameformer.health.detectors.data_wait import DataWait
from tameformer.health.detectors.detector import Detector
from tameformer.health.detectors.entropy_collapse import EntropyCollapse
from tameformer.health.detectors.logit_growth import LogitGrowth
from tameformer.health.detectors.loss_scale import LossScale
from tameformer.health.detectors.not_finite import NotFinite
from tameformer.health.detectors.over_fitting import OverFitting
from tameformer.health.detectors.rank_collapse import RankCollapse
from tameformer.health.detectors.stalled import Stalled
from tameformer.health.detectors.update_norm_rise import UpdateNormRise
from tameformer.health.detectors.vanishing_gradient import VanishingGradient
from tameformer.health.verdicts import Verdict
from tameformer.limits import (
    ALWAYS_CLIPPED,
    ENTROPY_COLLAPSED,
    LOGITS_LARGE,
    LOSS_STALLED,
    OVER_FITTING_RISE,
    RANK_COLLAPSED,
)


@dataclass(frozen=True, kw_only=True)
class DetectorsConfig:
    """What the run warns of, and beyond which limits; null switches a detector off. A warning changes nothing in the run."""

    not_finite: bool = True
    """Whether a measurement that becomes NaN or infinite is told; loss and gradient norm are the guard's."""
    update_norm_rise: float | None = 2.0
    """Size of the updates over the learning rate, as a multiple of the usual."""
    entropy_collapse: float | None = ENTROPY_COLLAPSED
    """Share of its ceiling below which a head's attention entropy has collapsed."""
    logit_growth: float | None = LOGITS_LARGE
    """Attention logit above which a head is told."""
    rank_collapse: float | None = RANK_COLLAPSED
    """Rank residual below which the tokens of a layer are nearly one vector."""
    stalled: float | None = 1 - LOSS_STALLED
    """Share of the trivial predictor's loss above which nothing has been learned."""
    over_fitting: float | None = OVER_FITTING_RISE
    """Least rise of the evaluation loss above its best, as a share of that."""
    vanishing_gradient: float | None = 1.0
    """RMS of a module's gradient over Adam's epsilon below which its update vanishes."""
    clip_rate: float | None = ALWAYS_CLIPPED
    """Share of clipped steps above which clipping never stops."""
    loss_scale: float | None = 1.0
    """Loss scale of float16 below which gradients underflow."""
    data_wait: float | None = 0.25
    """Share of the time spent waiting for data."""

    def __post_init__(self) -> None:
        for name in ("update_norm_rise", "entropy_collapse", "logit_growth", "rank_collapse", "stalled", "over_fitting",
                     "vanishing_gradient", "clip_rate", "loss_scale", "data_wait"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"detectors.{name} must be positive, got {value}; null switches it off")
        for name in ("entropy_collapse", "rank_collapse", "stalled", "clip_rate", "data_wait"):
            value = getattr(self, name)
            if value is not None and value > 1:
                raise ValueError(f"detectors.{name} is a share and must be at most 1, got {value}")

    def build(self, *, trivial_loss: float | None = None, stalled_after: int = 200) -> "Detectors":
        """The detectors that are on.

        Args:
            trivial_loss: The loss of predicting frequencies only; None where it is not known, and no stall is told.
            stalled_after: Steps enough to learn something.
        """
        chosen: list[tuple[float | bool | None, Any]] = [
            (self.not_finite or None, lambda limit: NotFinite()),
            (self.update_norm_rise, UpdateNormRise),
            (self.entropy_collapse, EntropyCollapse),
            (self.logit_growth, LogitGrowth),
            (self.rank_collapse, RankCollapse),
            (self.stalled, lambda limit: Stalled(trivial_loss, after=stalled_after, share=limit)),
            (self.over_fitting, OverFitting),
            (self.vanishing_gradient, VanishingGradient),
            (self.clip_rate, ClipRate),
            (self.loss_scale, LossScale),
            (self.data_wait, DataWait),
        ]
        return Detectors([detector(limit) for limit, detector in chosen if limit is not None])


class Detectors:
    """Asks several detectors about each line of a run's measurements.

    Args:
        detectors: Of different names; None takes all at their defaults.

    Example:
        >>> detectors = Detectors()
        >>> [verdict.text for verdict in detectors.observe(40, {"diag/attention_logit_max/layers.0/2": 3e4})]
        ['Attention logits are 30,000 in layers.0 (head 2) since step 40; all runs of Wortsman et al. diverged beyond 10,000.']
        >>> detectors.observe(50, {"diag/attention_logit_max/layers.0/2": 4e4})
        []
    """

    def __init__(self, detectors: Sequence[Detector] | None = None) -> None:
        self.detectors = list(DetectorsConfig().build().detectors if detectors is None else detectors)
        names = [detector.name for detector in self.detectors]
        if len(set(names)) < len(names):
            raise ValueError(f"detectors must have different names, got {', '.join(names)}")

    def observe(self, step: int, values: Mapping[str, float]) -> list[Verdict]:
        """What begins with these measurements."""
        found = [detector.observe(step, values) for detector in self.detectors]
        return [verdict for verdict in found if verdict is not None]

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint, by detector."""
        return {detector.name: detector.state() for detector in self.detectors}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`; a detector that was off until now begins afresh."""
        for detector in self.detectors:
            if detector.name in state:
                detector.load(state[detector.name])
