"""Gradient clipping by norm, with the norm before clipping handed back.

References:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.tensors import gathered, is_ordinary

Norms = Callable[[Sequence[nn.Parameter], Tensor], None]
"""Takes the parameters that have a gradient, and the norm of each gradient after clipping, (parameters,)."""


@runtime_checkable
class Clip(Protocol):
    """Makes the gradients of a step smaller where it sees fit."""

    def __call__(self, *, tell_norms: Norms | None = None) -> Tensor:
        """Scale the gradients, and return their joint norm before."""
        ...

    def settle(self, taken: Tensor | bool) -> None:
        """Hear whether the step was taken; what was not leaves no trace."""
        ...

    def readings(self) -> Mapping[str, Tensor]:
        """Of the last call: `clipped`, 1 or 0, where anything may be, and limits that move, on the device."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        ...


class NormClip:
    """Clips the joint norm of all gradients of optimizers, with the same bound at each step.

    Args:
        optimizers: Whose gradients.
        max_norm: The bound; None measures and does not clip.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> NormClip([torch.optim.SGD([weight])], 1.0)(), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """

    def __init__(self, optimizers: Sequence[Optimizer], max_norm: float | None) -> None:
        self.optimizers, self.max_norm = tuple(optimizers), max_norm
        self._readings: dict[str, Tensor] = {}

    def __call__(self, *, tell_norms: Norms | None = None) -> Tensor:
        """As `clip_norm`."""
        groups = [group["params"] for optimizer in self.optimizers for group in optimizer.param_groups]
        norm = clip_norm([parameter for group in groups for parameter in group], self.max_norm, tell_norms=tell_norms)
        if self.max_norm is not None:
            self._readings = {"clipped": (norm > self.max_norm).float()}
        return norm

    def settle(self, taken: Tensor | bool) -> None:
        """Nothing is remembered."""

    def readings(self) -> Mapping[str, Tensor]:
        """Whether the norm was above the bound, where there is one."""
        return self._readings

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float | None, *, tell_norms: Norms | None = None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before.

    A non-finite norm is returned as it is. Then the gradients are left untouched: multiplying by NaN or by 1/inf would
    spread one bad entry over every tensor and hide where it came from.

    Args:
        parameters: Those without a gradient are passed over.
        max_norm: None measures and does not clip.
        tell_norms: Called with the norm of each gradient, which costs nothing more; not called for gradients that are sharded,
            of several types, or narrower than fp32, whose norms are not known one by one or not well enough.

    Returns:
        The norm before clipping, a scalar on the gradients' device; 0 when there is no gradient.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_norm([weight], 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if not gradients or not alike(gradients):
        norm = gathered(torch.nn.utils.get_total_norm(gradients))  # the norm of the shards is not yet the norm
        _scale(gradients, norm, max_norm)
        return norm
    norms = torch.stack(torch._foreach_norm(gradients))  # pyright: ignore
    norm = torch.linalg.vector_norm(norms)
    factor = _scale(gradients, norm, max_norm)
    if tell_norms is not None and norms.dtype.itemsize >= 4:
        tell_norms(trained, norms * factor)
    return norm


def _scale(gradients: list[Tensor], norm: Tensor, max_norm: float | None) -> Tensor | float:
    """Multiply by the factor that brings the norm to its bound, and return it."""
    if max_norm is None or not gradients:
        return 1.0
    if norm.device.type != "cpu":
        factor = _factor_on_device(norm, max_norm)
        torch._foreach_mul_(gradients, factor)  # pyright: ignore
        return factor
    value = norm.item()  # no device waits for this one, and most steps need no second pass over the gradients
    if not max_norm < value < math.inf:
        return 1.0
    torch._foreach_mul_(gradients, max_norm / value)  # pyright: ignore
    return max_norm / value


def _factor_on_device(norm: Tensor, max_norm: float) -> Tensor:
    """1 for a norm that is within the bound or not finite; nobody waits for the device."""
    return torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1.0), torch.ones_like(norm))


def alike(tensors: list[Tensor]) -> bool:
    """Whether each is an ordinary tensor, all of one type and on one device."""
    first = tensors[0]
    return all(is_ordinary(one) and one.device == first.device and one.dtype == first.dtype for one in tensors)
