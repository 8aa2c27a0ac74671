"""From names in a configuration to optimizers and schedules: the one place where a string becomes code."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from tameformer.optim import schedules
from tameformer.optim.adaptive_clip import AdaptiveClip
from tameformer.optim.clipping import Clip, NormClip
from tameformer.optim.eager import eager
from tameformer.optim.groups import Rule, assign, decay_groups, decay_rules, is_matrix
from tameformer.optim.lars import LARS
from tameformer.optim.stable_adamw import StableAdamW
from tameformer.tensors import is_sharded

Schedule = Callable[[int], float]
"""From the step, counted from 0, to the factor on every group's peak rate."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights are updated."""

    name: Literal["adamw", "adam", "radam", "stable_adamw", "sgd", "lars", "muon"] = "adamw"
    """Optimizer; `muon` updates the hidden matrices and leaves the rest to AdamW at `adamw_lr`, `stable_adamw` is AdamW with
    shorter steps where gradients outgrow the second moment."""
    peak_lr: float = 1e-3
    """Largest learning rate that the schedule reaches."""
    base_batch_size: int | None = None
    """The batch size that the rates are for: with another one they are scaled, by the ratio (sgd, lars) or its square root.
    In the unit of the recipe's batches: samples, tokens or frames. Null takes the rates as they are."""
    adamw_lr: float | None = None
    """With `muon`: the peak rate of everything that is not a hidden matrix; null takes `peak_lr`."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of the first and second moment (Adam family)."""
    eps: float = 1e-8
    """Added to the root of the second moment (Adam family)."""
    momentum: float = 0.9
    """Of the velocity (sgd, lars, muon)."""
    schedule: Literal[
        "constant", "linear", "cosine", "one_cycle", "inverse_sqrt", "warmup_stable_decay", "triangle"
    ] = "cosine"
    """Shape of the learning rate over the run."""
    warmup_steps: int | float = 0.05
    """Steps of warm-up; a fraction below 1 is a share of the run."""
    final_lr_ratio: float = 0.0
    """Last learning rate as a share of the peak (schedules that decay)."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this joint norm; null measures and does not clip."""
    clipping: Literal["norm", "adaptive"] = "norm"
    """`adaptive` also scales each group's gradients down where they are a spike against its past (`tame.AdaptiveClip`)."""
    ema_decay: float | None = None
    """Evaluate and keep an exponential moving average of the weights with this decay per step."""

    def __post_init__(self) -> None:
        for name in ("peak_lr", "adamw_lr", "eps", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"optim.{name} must be positive, got {value}")
        if self.base_batch_size is not None and self.base_batch_size < 1:
            raise ValueError(f"optim.base_batch_size must be at least 1, got {self.base_batch_size}")
        if self.weight_decay < 0:
            raise ValueError(f"optim.weight_decay must not be negative, got {self.weight_decay}")
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"optim.{name} must lie in [0, 1), got {value}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay must lie between 0 and 1, got {self.ema_decay}; null switches it off")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"optim.final_lr_ratio must lie in [0, 1], got {self.final_lr_ratio}")
        if self.warmup_steps < 0 or (isinstance(self.warmup_steps, float) and self.warmup_steps >= 1):
            raise ValueError(
                f"optim.warmup_steps must be a number of steps (an integer) or a share of the run below 1, "
                f"got {self.warmup_steps}"
            )
        if self.adamw_lr is not None and self.name != "muon":
            raise ValueError(f"optim.adamw_lr is used by muon only, got optim.name {self.name}; remove it")


_SCHEDULES: Mapping[str, Callable[..., float]] = {
    "constant": schedules.constant,
    "linear": schedules.linear,
    "cosine": schedules.cosine,
    "one_cycle": schedules.one_cycle,
    "inverse_sqrt": schedules.inverse_sqrt,
    "warmup_stable_decay": schedules.warmup_stable_decay,
    "triangle": schedules.triangle,
}
_WITHOUT_FINAL = {"constant", "inverse_sqrt"}


def warmup_steps(config: OptimConfig, *, total_steps: int) -> int:
    """The warm-up in steps.

    Raises:
        ValueError: The warm-up is longer than the run.
    """
    share = isinstance(config.warmup_steps, float) and config.warmup_steps < 1
    steps = round(config.warmup_steps * total_steps) if share else int(config.warmup_steps)
    if steps > total_steps:
        raise ValueError(
            f"optim.warmup_steps is {steps}, longer than the run of {total_steps} steps; "
            f"lower it, give a share such as 0.1, or train longer"
        )
    return steps


def schedule(config: OptimConfig, *, total_steps: int) -> Schedule:
    """The schedule that the configuration names, as a function of the step.

    Example:
        >>> rate = schedule(OptimConfig(schedule="linear", warmup_steps=0), total_steps=10)
        >>> [rate(step) for step in (0, 5, 10)]
        [1.0, 0.5, 0.0]
    """
    settings: dict[str, Any] = {
        "total_steps": total_steps,
        "warmup_steps": warmup_steps(config, total_steps=total_steps),
    }
    if config.schedule not in _WITHOUT_FINAL:
        settings["final_ratio"] = config.final_lr_ratio
    elif config.final_lr_ratio:
        raise ValueError(f"optim.final_lr_ratio has no meaning for the schedule {config.schedule}; set it to 0")
    return partial(_SCHEDULES[config.schedule], **settings)


def clip(optimizers: Sequence[Optimizer], config: OptimConfig) -> Clip:
    """The clipping that the configuration names.

    Example:
        >>> weight = nn.Parameter(torch.ones(2))
        >>> type(clip([torch.optim.SGD([weight])], OptimConfig(clipping="adaptive"))).__name__
        'AdaptiveClip'
    """
    if config.clipping == "adaptive":
        return AdaptiveClip(optimizers, max_norm=config.max_grad_norm)
    return NormClip(optimizers, config.max_grad_norm)


def optimizers(
    model: nn.Module, config: OptimConfig, *, is_hidden: Callable[[str], bool] = lambda name: True
) -> list[Optimizer]:
    """The optimizers that the configuration names; together they hold every trainable parameter once.

    Args:
        model: The model, with all patches already applied.
        config: The settings.
        is_hidden: For `muon`: whether a matrix, by its full name, is inside the stack. The matrices of stems and output
            heads stay with AdamW (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").

    Returns:
        One optimizer, or two for `muon`; with fused kernels where torch has them.
    """
    if config.name == "muon":
        return _muon_and_adamw(model, config, is_hidden)
    groups = decay_groups(model, weight_decay=config.weight_decay)
    adam: dict[str, Any] = {"lr": config.peak_lr, "betas": config.betas, "eps": config.eps}
    match config.name:
        case "adamw":
            return [eager(torch.optim.AdamW)(groups, **adam, fused=True)]
        case "adam":
            return [eager(torch.optim.Adam)(groups, **adam, fused=True)]
        case "radam":
            return [eager(torch.optim.RAdam)(groups, **adam, decoupled_weight_decay=True)]
        case "stable_adamw":
            return [eager(StableAdamW)(groups, **adam)]
        case "sgd":
            # torch's fused kernel of SGD does not know sharded weights; Adam's does.
            fused = not any(map(is_sharded, model.parameters()))
            return [eager(torch.optim.SGD)(groups, lr=config.peak_lr, momentum=config.momentum, fused=fused)]
        case "lars":
            return [eager(LARS)(groups, lr=config.peak_lr, momentum=config.momentum)]


def _muon_and_adamw(model: nn.Module, config: OptimConfig, is_hidden: Callable[[str], bool]) -> list[Optimizer]:
    def is_hidden_matrix(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and is_matrix(name, module, parameter) and is_hidden(name)

    hidden = Rule("hidden", is_hidden_matrix, {"weight_decay": config.weight_decay})
    first, *rest = assign(model, [hidden, *decay_rules(config.weight_decay)])
    if not first["params"]:
        raise ValueError(f"muon needs hidden matrices and {type(model).__name__} has none; use adamw")
    # Scaling each update to the size of AdamW's lets one rate and one schedule serve both (Liu et al. 2025, arXiv:2502.16982).
    muon = eager(torch.optim.Muon)([first], lr=config.peak_lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw")
    adamw = eager(torch.optim.AdamW)(
        [group for group in rest if group["params"]],
        lr=config.adamw_lr or config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    return [muon, adamw]
