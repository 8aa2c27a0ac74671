"""The probes by name, and the set that is on where nobody says otherwise."""

from collections.abc import Callable, Sequence

from torch import nn
from torch.optim import Optimizer

from tameformer.probes.activations import Activations
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.probes.branch_share import BranchShare
from tameformer.probes.dead_units import DeadUnits
from tameformer.probes.gradients import GradientNorm, GradientOverEpsilon
from tameformer.probes.head_output import HeadOutput
from tameformer.probes.log_partition import LogPartition
from tameformer.probes.probe import Probe
from tameformer.probes.rank_residual import RankResidual
from tameformer.probes.spectral_norm import SpectralNorm
from tameformer.probes.update_ratio import UpdateRatio

Build = Callable[[nn.Module, Sequence[Optimizer]], Probe]

PROBES: dict[str, Build] = {
    "attention_entropy": lambda model, optimizers: AttentionEntropy(),
    "head_output": lambda model, optimizers: HeadOutput(),
    "branch_share": lambda model, optimizers: BranchShare(),
    "dead_units": lambda model, optimizers: DeadUnits(),
    "activations": lambda model, optimizers: Activations(),
    "rank_residual": lambda model, optimizers: RankResidual(),
    "spectral_norm": lambda model, optimizers: SpectralNorm(model),
    "grad_norm": lambda model, optimizers: GradientNorm(model),
    "grad_rms_over_epsilon": lambda model, optimizers: GradientOverEpsilon(model, optimizers),
    "update_ratio": lambda model, optimizers: UpdateRatio(model),
    "log_partition": lambda model, optimizers: LogPartition(),
}
"""Every probe, by the name it has in configurations."""


def default_probes(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> list[Probe]:
    """All probes, those of gradients and updates only where there is an optimizer to see them.

    Example:
        >>> len(default_probes(nn.Linear(2, 2)))
        9
    """
    norms = GradientNorm(model)  # one pass over the gradients serves both quantities
    shared: dict[str, Probe] = {"grad_norm": norms}
    if optimizers:
        shared["grad_rms_over_epsilon"] = GradientOverEpsilon(model, optimizers, norms=norms)
    needless = {"grad_rms_over_epsilon", "update_ratio"} if not optimizers else set()
    return [shared.get(name) or build(model, optimizers) for name, build in PROBES.items() if name not in needless]
