"""How a model is doing: measurements for anyone's loop and of single batches, and what they mean in words."""

from tameformer.health.detectors import Detectors, DetectorsConfig, prior_loss
from tameformer.health.diagnose import diagnose
from tameformer.health.diagnosis import Diagnosis
from tameformer.health.guard import Guard
from tameformer.health.monitor import Monitor
from tameformer.health.policy import GuardConfig, Policy
from tameformer.health.verdicts import Verdict, judge

__all__ = [
    "Detectors",
    "DetectorsConfig",
    "Diagnosis",
    "Guard",
    "GuardConfig",
    "Monitor",
    "Policy",
    "Verdict",
    "diagnose",
    "judge",
    "prior_loss",
]
