"""What begins to go wrong in a run, told from its measurements alone, one kind of trouble a file."""

from tameformer.health.detectors.clip_rate import ClipRate
from tameformer.health.detectors.data_wait import DataWait
from tameformer.health.detectors.detector import Detector
from tameformer.health.detectors.detectors import Detectors, DetectorsConfig
from tameformer.health.detectors.entropy_collapse import EntropyCollapse
from tameformer.health.detectors.logit_growth import LogitGrowth
from tameformer.health.detectors.loss_scale import LossScale
from tameformer.health.detectors.not_finite import NotFinite
from tameformer.health.detectors.over_fitting import OverFitting
from tameformer.health.detectors.rank_collapse import RankCollapse
from tameformer.health.detectors.stalled import Stalled, prior_loss
from tameformer.health.detectors.update_norm_rise import UpdateNormRise
from tameformer.health.detectors.vanishing_gradient import VanishingGradient

__all__ = [
    "ClipRate",
    "DataWait",
    "Detector",
    "Detectors",
    "DetectorsConfig",
    "EntropyCollapse",
    "LogitGrowth",
    "LossScale",
    "NotFinite",
    "OverFitting",
    "RankCollapse",
    "Stalled",
    "UpdateNormRise",
    "VanishingGradient",
    "prior_loss",
]
