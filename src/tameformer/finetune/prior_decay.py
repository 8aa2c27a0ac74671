"""Decay toward the pretrained weights instead of toward zero (Wiese et al. 2017, arXiv:1706.03610; L2-SP, arXiv:1802.01483).

Before each step of the optimizer, with its present learning rate lr (Zhang et al. 2021, arXiv:2006.05987, appendix):

    W <- W - lr * decay * (W - W0)

Decoupled as in AdamW: it is no gradient, no optimizer rescales it, and it vanishes where the rate does.

Differs from the published code: W0 is part of the model's state and is found by name, where the published one is lost with the
process; new heads are left alone, which the published one means to; ordinary weight decay is whatever the groups say.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.errors import PatchError
from tameformer.finetune.places import Place, places
from tameformer.patch import PatchHandle
from tameformer.tensors import is_sharded, local_part

SUFFIX = "_prior"
"""A weight's prior is a buffer beside it with this after its name."""


def pretrained(name: str, parameter: nn.Parameter, place: Place | None) -> bool:
    """What is inside the layers or before them: no head, which has nothing to be held to."""
    return place is not None and place.above > 0


def prior_decay(
    model: nn.Module,
    optimizers: Optimizer | Sequence[Optimizer],
    *,
    decay: float = 0.01,
    where: Callable[[str, nn.Parameter, Place | None], bool] = pretrained,
) -> PatchHandle:
    """Pull weights back toward what they are now, before each step of any `torch.optim.Optimizer`.

    Call it once the pretrained weights are loaded and the optimizer is built. The present weights become buffers beside the
    weights: they go into checkpoints and follow `.to`. A step that is not taken does not decay, also where an optimizer is told
    by a tensor not to take it, as torch's gradient scaler does. In bfloat16 a decay below the last digit is lost, as is any.

    Under DDP give it the model itself. Under FSDP2 call it after `fully_shard`, once the optimizer holds the sharded weights:
    each prior is sharded as its weight is.

    Args:
        model: Wrapped in nothing but `fully_shard`.
        optimizers: One or more, which together hold the weights.
        decay: Share of the distance to the pretrained weights that is taken back at a rate of 1.
        where: Takes parameters by name, value and place; the place is None where the model has no repeated layers.

    Returns:
        The handle; removing and baking are the same, and the weights stay where they are.

    Raises:
        ValueError: `decay` is negative or not finite.
        PatchError: Nothing matches, or a parameter is in none of the optimizers, or has a prior already.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> handle = prior_decay(layer, optimizer, decay=5.0, where=lambda name, weight, place: True)
        >>> distance = layer.weight.item() - layer.weight_prior.item()
        >>> with torch.no_grad(): _ = layer.weight.add_(1.0)
        >>> layer.weight.grad = torch.zeros(1, 1)
        >>> optimizer.step()
        >>> round(layer.weight.item() - layer.weight_prior.item(), 4)
        0.5
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"expected a finite decay of at least 0, got {decay}")
    every = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    held = {id(one) for optimizer in every for group in optimizer.param_groups for one in group["params"]}
    try:
        found = places(model)
    except PatchError:
        found = {}
    chosen = [name for name, one in model.named_parameters() if one.requires_grad and where(name, one, found.get(name))]
    if not chosen:
        raise PatchError(f"{type(model).__name__} has nothing to hold: looked for parameters in layers; mend where=")
    members: list[tuple[nn.Module, str]] = []
    with ExitStack() as undo:
        for name in chosen:
            path, _, own = name.rpartition(".")
            owner = model.get_submodule(path)
            weight = getattr(owner, own)
            if hasattr(owner, own + SUFFIX):
                raise PatchError(f"{name} has a prior already; remove that first")
            if id(weight) not in held:
                raise PatchError(
                    f"{name} is in none of the optimizers; build them from this model (after fully_shard), or mend where="
                )
            owner.register_buffer(own + SUFFIX, weight.detach().clone())
            undo.callback(delattr, owner, own + SUFFIX)
            members.append((owner, own))
        for optimizer in every:
            hook = optimizer.register_step_pre_hook(_Decay(members, decay))
            undo.callback(hook.remove)
        kept = undo.pop_all()
    return PatchHandle("prior_decay", chosen, kept, bake=kept.close, settings={"decay": decay})


class _Decay:
    """What happens before a step of one optimizer."""

    def __init__(self, members: Sequence[tuple[nn.Module, str]], decay: float) -> None:
        self.members, self.decay = members, decay

    @torch.no_grad()
    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # Looked up anew: `.to` and loading may have put other tensors in their place.
        priors = {id(getattr(owner, name)): _sharded_alike(owner, name) for owner, name in self.members}
        refused = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            weights = [one for one in group["params"] if id(one) in priors and one.grad is not None]
            if weights:
                decay_toward(weights, [priors[id(one)] for one in weights], group["lr"] * self.decay, refused=refused)


def _sharded_alike(owner: nn.Module, name: str) -> Tensor:
    """The prior, cut as its weight is; one that came whole, as by loading a state, is replaced by this process's part."""
    weight, prior = getattr(owner, name), getattr(owner, name + SUFFIX)
    if is_sharded(prior) or not is_sharded(weight):
        return prior
    from torch.distributed.tensor import distribute_tensor

    prior = distribute_tensor(prior, weight.device_mesh, weight.placements, src_data_rank=None)
    setattr(owner, name + SUFFIX, prior)
    return prior


def decay_toward(
    weights: list[Tensor], priors: list[Tensor], share: float | Tensor, *, refused: Tensor | None = None
) -> None:
    """Weights <- weights - share (weights - priors), in place; nothing where `refused` is not 0, which nobody waits for.

    Example:
        >>> weight = torch.tensor([2.0])
        >>> decay_toward([weight], [torch.tensor([1.0])], 0.25)
        >>> weight
        tensor([1.7500])
    """
    weights, priors = [local_part(one) for one in weights], [local_part(one) for one in priors]
    if refused is None and not isinstance(share, Tensor):
        torch._foreach_lerp_(weights, priors, share)  # pyright: ignore[reportPrivateImportUsage]
        return
    for weight, prior in zip(weights, priors, strict=True):
        taken = 1.0 if refused is None else (refused == 0).to(weight)
        weight.lerp_(prior, torch.as_tensor(share * taken, dtype=weight.dtype, device=weight.device))
