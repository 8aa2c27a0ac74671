"""AdamW whose steps shrink where the second moment lags behind the gradients (Wortsman et al. 2023, arXiv:2304.13013, alg. 2).

After a while of small gradients v is small, too, and the first large ones are divided by far too little: the loss spikes, most
often by way of the embedding. Per tensor, the root mean square of g / max(sqrt(v), eps) tells; where it is above 1 the rate is
divided by it (the update clipping of Adafactor, Shazeer and Stern 2018, arXiv:1804.04235, section 6).

Differs from the paper: nothing. With their correction folded into the betas its moments are AdamW's corrected ones, so that it
is AdamW wherever the root mean square is at most 1. Differs from other code: nothing waits for the device, and of a weight that
is sharded over processes the mean is over all of it. Meant instead of clipping by norm. Not for: sparse gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.shapes import Float
from tameformer.tensors import is_sharded, local_part


def update_rms(gradients: Sequence[Tensor], second_roots: Sequence[Tensor], *, eps: float) -> Float[Tensor, " tensors"]:
    """Root mean square of g / max(sqrt(v), eps), tensor by tensor, in fp32 at least; about 1 while v keeps up.

    Args:
        gradients: All on one device, of one type.
        second_roots: The root of each one's corrected second moment.
        eps: Below this a root counts as this.

    Example:
        >>> update_rms([torch.tensor([3.0, 4.0])], [torch.tensor([1.0, 4.0])], eps=1e-8)
        tensor([2.2361])
    """
    return _mean_squares(gradients, second_roots, gradients, eps=eps).sqrt_()


class StableAdamW(Optimizer):
    """AdamW with update clipping.

    Args:
        params: Parameters or groups, as for any torch optimizer.
        lr: The peak rate, before it is divided.
        betas: Decay of the first and second moment; the paper's beta2 is between 0.95 and 0.995.
        eps: Added to the root of the second moment, and the least that a gradient is compared with.
        weight_decay: Decoupled; it follows the divided rate.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = StableAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> for size in (1.0, 1.0, 100.0):  # the third step is as long as 0.1 * 37.5 / 100, where AdamW takes 37.5 / 58
        ...     weight.grad = torch.full_like(weight, size)
        ...     optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.7625, 0.7625], requires_grad=True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas) or not eps > 0 or lr < 0 or weight_decay < 0:
            raise ValueError(
                "expected betas in [0, 1), eps above 0, and lr and weight_decay of at least 0, "
                f"got {betas}, {eps}, {lr} and {weight_decay}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in _alike(group["params"]):
                self._update(weights, group)
        return loss

    def _update(self, weights: list[nn.Parameter], group: dict[str, Any]) -> None:
        """All of a group's weights that are of one kind together, so that an accelerator is given few kernels."""
        states = [self._state(weight) for weight in weights]
        gradients = [local_part(weight.grad) for weight in weights if weight.grad is not None]
        firsts, seconds = ([local_part(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = [state["step"].add_(1).item() for state in states]  # counted on the processor, as torch does
        # The share of the newest value in a moment that is corrected for its start.
        shares = [[(1 - beta) / (1 - beta**step) for step in steps] for beta in group["betas"]]
        torch._foreach_lerp_(firsts, gradients, shares[0])  # pyright: ignore
        torch._foreach_mul_(seconds, [1 - share for share in shares[1]])  # pyright: ignore
        torch._foreach_addcmul_(seconds, gradients, gradients, shares[1])  # pyright: ignore
        roots = torch._foreach_sqrt(seconds)  # pyright: ignore
        squares = _over_all_shards(_mean_squares(gradients, roots, weights, eps=group["eps"]), weights[0])
        rates = (-group["lr"] / squares.sqrt_().clamp_(min=1)).to(roots[0].dtype)
        torch._foreach_add_(roots, group["eps"])  # pyright: ignore
        updates = torch._foreach_div(firsts, roots)  # pyright: ignore
        targets = [local_part(weight) for weight in weights]
        if group["weight_decay"]:
            torch._foreach_add_(updates, targets, alpha=group["weight_decay"])  # pyright: ignore
        torch._foreach_mul_(updates, list(rates.unbind()))  # pyright: ignore
        torch._foreach_add_(targets, updates)  # pyright: ignore

    def _state(self, weight: nn.Parameter) -> dict[str, Any]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


def _mean_squares(
    gradients: Sequence[Tensor], second_roots: Sequence[Tensor], whole: Sequence[Tensor], *, eps: float
) -> Float[Tensor, " tensors"]:
    """Of g / max(sqrt(v), eps), over the size of the whole; quotients are squared, for squares of small gradients are 0."""
    quotients = torch._foreach_div(gradients, torch._foreach_clamp_min(second_roots, eps))  # pyright: ignore
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norms = torch._foreach_norm(quotients, 2, wide)  # pyright: ignore
    torch._foreach_mul_(norms, [max(1, one.numel()) ** -0.5 for one in whole])  # pyright: ignore
    return torch.stack(norms).square_()


def _over_all_shards(squares: Tensor, weight: Tensor) -> Tensor:
    """The sums of what all processes found in their shards; one exchange for all weights."""
    if not is_sharded(weight):
        return squares
    from torch.distributed.tensor import DTensor, Partial, Replicate

    known: Any = weight
    held = [Replicate() if placement.is_replicate() else Partial() for placement in known.placements]
    return DTensor.from_local(squares, known.device_mesh, held).full_tensor()


def _alike(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that have a gradient, by type, device, and how they are spread over processes."""
    found: dict[Any, list[nn.Parameter]] = {}
    for one in parameters:
        if one.grad is None:
            continue
        if one.grad.layout != torch.strided:
            raise ValueError(
                f"StableAdamW expects dense gradients, got one of shape {tuple(one.shape)} as {one.grad.layout}; "
                "build the embedding with sparse=False"
            )
        spread = (one.device_mesh, one.placements) if is_sharded(one) else None  # pyright: ignore
        found.setdefault((one.dtype, one.device, spread), []).append(one)
    return list(found.values())
