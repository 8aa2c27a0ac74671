"""Gradient clipping by norm, with the norm before clipping handed back.

References:
    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", arXiv:1211.5063.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def clip_norm(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint L2 norm is at most `max_norm`; returns the norm before.

    A non-finite norm is returned as it is. Then the gradients are left untouched: multiplying by NaN or by 1/inf would
    spread one bad entry over every tensor and hide where it came from.

    Args:
        parameters: Those without a gradient are passed over.
        max_norm: None measures and does not clip.

    Returns:
        The norm before clipping, a scalar on the gradients' device; 0 when there is no gradient.

    Example:
        >>> weight = nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_norm([weight], 1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or not _plain_on_cpu(gradients):
        return _clip_norm_on_device(gradients, max_norm)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))  # pyright: ignore
    value = norm.item()  # no device waits for this one, and most steps need no second pass over the gradients
    if max_norm is not None and max_norm < value < math.inf:
        torch._foreach_mul_(gradients, max_norm / value)  # pyright: ignore
    return norm


def _clip_norm_on_device(gradients: list[Tensor], max_norm: float | None) -> Tensor:
    """As `clip_norm`, without waiting for the device; also for gradients that are sharded over processes."""
    norm = torch.nn.utils.get_total_norm(gradients)
    if hasattr(norm, "full_tensor"):  # the norm of the shards is not yet the norm
        norm = norm.full_tensor()  # pyright: ignore
    if max_norm is not None and gradients:
        factor = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1.0), torch.ones_like(norm))
        torch._foreach_mul_(gradients, factor)  # pyright: ignore
    return norm


def _plain_on_cpu(tensors: list[Tensor]) -> bool:
    """Whether each is an ordinary tensor in this process's memory, all of one type."""
    first = tensors[0].dtype
    return all(type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.dtype == first for tensor in tensors)
