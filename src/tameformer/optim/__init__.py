"""How weights are updated: parameter groups, schedules, clipping, and the two optimizers that torch lacks."""

from tameformer.optim.adaptive_clip import AdaptiveClip
from tameformer.optim.batch_size import for_batch_size
from tameformer.optim.clipping import Clip, NormClip, clip_norm
from tameformer.optim.groups import Rule, Selector, decay_groups, is_any, is_matrix, parameter_groups
from tameformer.optim.lars import LARS
from tameformer.optim.settings import OptimConfig, Schedule, clip, optimizers, schedule, warmup_steps
from tameformer.optim.stable_adamw import StableAdamW

__all__ = [
    "LARS",
    "AdaptiveClip",
    "Clip",
    "NormClip",
    "OptimConfig",
    "Rule",
    "Schedule",
    "Selector",
    "StableAdamW",
    "clip",
    "clip_norm",
    "decay_groups",
    "for_batch_size",
    "is_any",
    "is_matrix",
    "optimizers",
    "parameter_groups",
    "schedule",
    "warmup_steps",
]
