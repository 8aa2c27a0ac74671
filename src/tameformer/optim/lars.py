"""Layer-wise adaptive rate scaling (You et al. 2017, "Large Batch Training of Convolutional Networks", arXiv:1708.03888).

Differs from the paper: the weight decay of a group with `weight_decay=0` also switches its rate scaling off, as in later
use (biases and norms take plain momentum steps). Torch 2.13 has no LARS. Not for: sparse gradients.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def trust_ratio(weight: Tensor, gradient: Tensor, *, weight_decay: float, trust: float) -> Tensor:
    """The factor on one tensor's rate, trust |w| / (|g| + decay |w|); 1 where either norm is 0 (eq. 6).

    Example:
        >>> trust_ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0]), weight_decay=0.0, trust=0.1)
        tensor(0.5000)
    """
    weight_norm, gradient_norm = weight.norm(), gradient.norm()
    ratio = trust * weight_norm / (gradient_norm + weight_decay * weight_norm)
    return torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, torch.ones_like(ratio))


class LARS(Optimizer):
    """SGD with momentum whose rate is scaled, tensor by tensor, to the size of the weights.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: The peak rate before scaling.
        momentum: Of the velocity.
        weight_decay: Added to the gradient; 0 also switches the scaling off.
        trust: The coefficient eta of the paper.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = LARS([weight], lr=1.0, weight_decay=1e-4)
        >>> weight.sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            decay = group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                direction = weight.grad
                if decay:
                    ratio = trust_ratio(weight, weight.grad, weight_decay=decay, trust=group["trust"])
                    direction = ratio * (weight.grad + decay * weight)
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                # The rate multiplies the direction inside the buffer, as in the paper's algorithm 1.
                state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=group["lr"])
                weight.sub_(state["momentum_buffer"])
        return loss
