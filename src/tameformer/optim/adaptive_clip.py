"""Gradient clipping at what was usual so far, a limit for each group of parameters.

As ZClip (Kumar et al. 2025, arXiv:2504.02507) it keeps a moving mean and variance of the gradient norm, cuts a norm that many
deviations above to `threshold` squared over so many, and learns from norms that it has cut. Differs in what breaks there:
a norm that is not finite, or exactly 0, enters nothing; logarithms are compared, because norms spread by factors; no norm is
cut below twice the usual, so that gradients of constant size are never touched; a group is judged by its own past.
Not for: runs whose gradients grow a hundredfold within a few steps for good; each step is then cut until the mean has followed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.optim.clipping import Norms, alike
from tameformer.shapes import Float
from tameformer.tensors import gathered

_LEAST = math.log(2)  # chosen here: a norm within twice the usual is no spike, however steady norms were


def spike_factors(
    norms: Float[Tensor, " groups"], statistics: Float[Tensor, "groups 3"], *, threshold: float, warmup_steps: int
) -> tuple[Float[Tensor, " groups"], Float[Tensor, " groups"]]:
    """What brings norms that are spikes back to the usual, 1 for others; and the limits, infinite while too little is known.

    With m and s the mean and deviation of log norm and w = max(threshold s, log 2), a norm with d = log norm - m > w is brought
    to m + w^2 / d: continuous at the limit, and all but the usual for a large spike.

    Args:
        norms: Gradient norms.
        statistics: Steps learned from, mean and variance of log norm.
        threshold: In standard deviations.
        warmup_steps: Steps before the first spike can be told.

    Example:
        >>> factors, limits = spike_factors(torch.tensor([1.0, 1e3]), torch.tensor([[50.0, 0.0, 0.0]] * 2),
        ...                                 threshold=2.5, warmup_steps=25)
        >>> factors * torch.tensor([1.0, 1e3]), limits
        (tensor([1.0000, 1.0720]), tensor([2., 2.]))
    """
    count, mean, variance = statistics.unbind(1)
    width = (threshold * variance.sqrt()).clamp(min=_LEAST)
    above = norms.log() - mean
    is_known = count >= warmup_steps
    is_spike = is_known & norms.isfinite() & (above > width)
    factors = torch.where(is_spike, (width.square() / above - above).exp(), torch.ones_like(norms))
    return factors, torch.where(is_known, (mean + width).exp(), torch.inf)


def learned(
    norms: Float[Tensor, " groups"],
    limits: Float[Tensor, " groups"],
    statistics: Float[Tensor, "groups 3"],
    *,
    decay: float,
) -> Float[Tensor, "groups 3"]:
    """The statistics after these norms, none counted with more than its limit; 0 and what is not finite change nothing.

    Example:
        >>> before = torch.tensor([[1.0, 0.0, 0.0]])
        >>> learned(torch.tensor([torch.nan]), torch.tensor([torch.inf]), before, decay=0.97)
        tensor([[1., 0., 0.]])
    """
    count, mean, variance = statistics.unbind(1)
    usable = norms.isfinite() & (norms > 0)
    weight = (1 / (count + 1)).clamp(min=1 - decay)  # an ordinary mean until it would be longer than the moving one
    change = torch.minimum(norms, limits).log() - mean
    after = torch.stack([count + 1, mean + weight * change, (1 - weight) * (variance + weight * change.square())], 1)
    return torch.where(usable[:, None], after, statistics)


class AdaptiveClip:
    """Scales the gradients of each parameter group down where they are a spike against the group's past.

    Nothing waits for an accelerator. Gradients that are not all finite are left as they are, for a guard to see.

    Args:
        optimizer: Whose groups, one or several.
        threshold: Standard deviations of log norm above the mean at which a spike begins, ZClip's.
        decay: Of the moving mean and variance, a step, ZClip's.
        warmup_steps: Steps before the first spike can be told, ZClip's.
        max_norm: A bound on the joint norm besides; None has none.

    Example:
        >>> weight = nn.Parameter(torch.ones(4))
        >>> clip = AdaptiveClip(torch.optim.SGD([weight], lr=0.1))
        >>> for size in [1.0] * 30 + [1000.0]:
        ...     weight.grad = torch.full((4,), size)
        ...     norm = clip()
        >>> norm, weight.grad.norm()
        (tensor(2000.), tensor(2.1441))
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        threshold: float = 2.5,
        decay: float = 0.97,
        warmup_steps: int = 25,
        max_norm: float | None = None,
    ) -> None:
        if not threshold > 0 or not 0 < decay < 1 or warmup_steps < 1:
            raise ValueError(
                f"expected threshold above 0, decay between 0 and 1 and warmup_steps of at least 1, "
                f"got {threshold}, {decay} and {warmup_steps}"
            )
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.threshold, self.decay, self.warmup_steps, self.max_norm = threshold, decay, warmup_steps, max_norm
        self.names = _names([group for each in self.optimizers for group in each.param_groups])
        self._statistics = self._before = torch.zeros(len(self.names), 3)
        self._readings: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, *, tell_norms: Norms | None = None) -> Tensor:
        """Clip, learn, and return the joint norm before; after `backward`, before the optimizer steps.

        Args:
            tell_norms: Called with the norm of each gradient after clipping, where they are known one by one.
        """
        groups = [
            [parameter for parameter in group["params"] if parameter.grad is not None]
            for each in self.optimizers
            for group in each.param_groups
        ]
        trained = [parameter for group in groups for parameter in group]
        if not trained:
            return torch.zeros(())
        single, norms = _norms(groups)
        joint = torch.linalg.vector_norm(norms)
        self._before = self._statistics = self._statistics.to(norms.device)
        factors, limits = spike_factors(
            norms, self._statistics, threshold=self.threshold, warmup_steps=self.warmup_steps
        )
        if self.max_norm is not None:
            rest = torch.linalg.vector_norm(norms * factors)
            factors = factors * (self.max_norm / rest).clamp(max=1.0)
        factors = torch.where(joint.isfinite(), factors, torch.ones_like(factors))
        seen = torch.where(joint.isfinite(), norms, torch.zeros_like(norms))
        self._statistics = learned(seen, limits, self._statistics, decay=self.decay)
        _scale(groups, factors)
        if tell_norms is not None and single is not None:
            scales = [factor.expand(len(group)) for factor, group in zip(factors, groups, strict=True)]
            tell_norms(trained, single * torch.cat(scales))
        self._readings = {"clipped": (factors.amin() < 1).float()}
        self._readings |= {f"limit/{name}": limit for name, limit in zip(self.names, limits, strict=True)}
        return joint

    def settle(self, taken: Tensor | bool) -> None:
        """Say whether the step was taken: of one that was not, nothing is learned."""
        if isinstance(taken, Tensor):
            self._statistics = torch.where(taken != 0, self._statistics, self._before)
        elif not taken:
            self._statistics = self._before

    def readings(self) -> Mapping[str, Tensor]:
        """Of the last call: whether anything was scaled, 1 or 0, and each group's limit."""
        return self._readings

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers by group, for a checkpoint."""
        return {"statistics": dict(zip(self.names, self._statistics.tolist(), strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, to the same bits; groups that it does not know begin afresh."""
        known = state.get("statistics", {})
        self._statistics = self._before = torch.tensor([known.get(name, [0.0, 0.0, 0.0]) for name in self.names])


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The groups' own names, or their numbers where they have none or share one."""
    named = [str(group.get("name", number)) for number, group in enumerate(groups)]
    return named if len(set(named)) == len(named) else [str(number) for number in range(len(groups))]


def _norms(groups: Sequence[Sequence[nn.Parameter]]) -> tuple[Tensor | None, Float[Tensor, " groups"]]:
    """The norm of each gradient, where they are ordinary tensors of one kind, and of each group, 0 for one without."""
    gradients = [parameter.grad for group in groups for parameter in group if parameter.grad is not None]
    if alike(gradients):
        single = torch.stack(torch._foreach_norm(gradients, 2, torch.float32))  # pyright: ignore
        parts = single.split([len(group) for group in groups])
        return single, torch.stack([torch.linalg.vector_norm(part) for part in parts])
    totals: list[Tensor] = []
    for group in groups:
        total = torch.nn.utils.get_total_norm([parameter.grad for parameter in group if parameter.grad is not None])
        totals.append(gathered(total).float())
    device = next(total.device for total, group in zip(totals, groups, strict=True) if group)
    return None, torch.stack([total.to(device) for total in totals])


def _scale(groups: Sequence[Sequence[nn.Parameter]], factors: Float[Tensor, " groups"]) -> None:
    """Multiply; a processor reads the factors and leaves out what stays as it is, an accelerator is not asked."""
    chosen = factors.tolist() if factors.device.type == "cpu" else list(factors.unbind())
    for group, factor in zip(groups, chosen, strict=True):
        gradients = [parameter.grad for parameter in group if parameter.grad is not None]
        if gradients and (isinstance(factor, Tensor) or factor != 1.0):
            torch._foreach_mul_(gradients, factor)  # pyright: ignore
