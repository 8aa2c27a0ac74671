"""Weights with a learned spectral norm.

Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv:2303.06296:

    effective weight = gamma / sigma(W) * W

with the spectral norm sigma of each linear map and a learned number gamma. The function no longer depends on the length of W,
so that the weights grow only as fast as gamma does, and attention stays spread out.

Differs from the published layers: works on any model in place and keeps its weights; query, key and value of a fused projection
have a gamma each; the singular vectors advance once per optimizer step, not once per forward pass; sigma starts exact.
Not for: models that are sharded or wrapped already (patch first).
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from tameformer.errors import PatchError
from tameformer.patch import PatchHandle, Selector, select
from tameformer.patch.parametrized import chain_of, parametrize, unparametrize
from tameformer.stabilizers.norm_removal import final_norms, is_norm
from tameformer.stabilizers.norm_removal import remove_norms as take_norms_out
from tameformer.stabilizers.sigma_weight import (
    FOLLOWED,
    SigmaReparam,
    Start,
    StepsAt,
    advance,
    by_shape,
    constant,
    effective_weight,
)
from tameformer.stabilizers.weight_parts import Parts, Rows, Split, is_transposed, split_fused, weight_names, whole
from tameformer.tensors import is_sharded

__all__ = [
    "Rows",
    "SigmaReparam",
    "advance",
    "by_shape",
    "effective_weight",
    "is_matrix_layer",
    "more_at_first",
    "sigma_reparam",
    "split_fused",
    "whole",
]


def more_at_first(updates: int) -> int:
    """Three power steps after each of the first 100 updates, when singular vectors change places, then one."""
    return 3 if updates < 100 else 1


def is_matrix_layer(name: str, module: nn.Module) -> bool:
    """Linear layers, transposed ones, convolutions and the joint projection of `MultiheadAttention`."""
    return bool(weight_names(module))


class _End(NamedTuple):
    """Where a weight sits."""

    path: str
    module: nn.Module
    name: str

    @property
    def full(self) -> str:
        return f"{self.path}.{self.name}" if self.path else self.name


def sigma_reparam(
    model: nn.Module,
    *,
    where: Selector = is_matrix_layer,
    gamma: float | None = None,
    gain: float | None = None,
    split: Split = split_fused,
    steps_at: StepsAt = more_at_first,
    remove_norms: bool | Selector = False,
    keep_final_norm: bool = True,
) -> PatchHandle:
    """Give every linear map of a model a learned spectral norm; call it before the optimizer is built.

    Outputs are unchanged bit for bit at the start, unless `gamma` or `gain` is given or norms are removed. Nothing has to be
    called in the training loop. Each access to a weight computes it, which costs a pass over it; in a loop that reads weights
    often, torch's `parametrize.cached()` around the forward pass computes it once. Gradients of gradients need a compiled
    model or `torch.func`.

    Args:
        model: Not yet wrapped or sharded.
        where: The layers; all linear layers and convolutions by default. A weight that is tied stays tied, and is changed at
            all its ends.
        gamma: Where gamma starts; None is at sigma, which keeps the function; the paper's speech and text models use 1.
        gain: Instead, gamma starts at gain * sqrt(out / in), see `by_shape`. For models without norms, whose signal fades where
            every gamma is 1.
        split: The parts of fused projections, each with its own gamma; `whole` leaves them in one.
        steps_at: Power steps after each update.
        remove_norms: Take the norms out, which changes the function: the variant of the paper's vision models. A selector
            says which; True is all.
        keep_final_norm: With `remove_norms=True`, leave the norm after the last layer.

    Returns:
        The handle. `remove` gives back the stored weights W with the values they have then; `bake` writes the effective weights
        into them, and leaves removed norms out.

    Raises:
        ValueError: Both `gamma` and `gain` are given.
        PatchError: Nothing matches; a weight is patched already, zero, not finite, sharded, or cannot be computed on access.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> handle = sigma_reparam(model)
        >>> handle.names, len(handle.new_parameters)
        (('0.weight', '2.weight'), 2)
        >>> handle.bake()
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    start = start_at(gamma, gain)
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise PatchError(
                "the model is wrapped in DistributedDataParallel, which would not reduce gamma; patch, then wrap"
            )
    layers = select(model, where, looked_for="linear layers, convolutions, attention projections")
    weights = list(plain_weights(layers))
    ends = _ends(model, {id(parameter) for _, parameter in weights})
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    names, members = [], []
    with ExitStack() as undo:
        for first, parameter in weights:
            if any(parameter is member.weight for member in members):
                continue  # tied to an earlier one
            rows = split(first.path, first.module, parents.get(id(first.module)))
            parts = Parts(parameter.shape, transposed=is_transposed(first.module), rows=rows)
            one = SigmaReparam(parameter, parts, start=start, steps_at=steps_at, name=first.full)
            for end in ends[id(parameter)]:
                parametrize(end.module, end.name, one)
                undo.callback(unparametrize, end.module, end.name, one)
                names.append(end.full)
            chain = chain_of(first.module, first.name)
            assert chain is not None, "it was just made"
            one.attach(chain)
            undo.callback(FOLLOWED.discard, one)
            members.append(one)
        weights_undo, norms_undo = undo.pop_all(), ExitStack()
        undo.push(weights_undo)
        if remove_norms:
            kept = final_norms(model) if remove_norms is True and keep_final_norm else set()
            which = is_norm if remove_norms is True else remove_norms
            undo.push(norms_undo)
            take_norms_out(model, lambda name, module: name not in kept and which(name, module), norms_undo)
        return PatchHandle(
            "sigma_reparam",
            names,
            undo.pop_all(),
            bake=partial(_bake, members, weights_undo),
            new_parameters=[one.gamma for one in members],
            settings={
                "gamma": gamma,
                "gain": gain,
                "remove_norms": bool(remove_norms),
                "keep_final_norm": keep_final_norm,
            },
        )


def start_at(gamma: float | None, gain: float | None) -> Start | None:
    """Where gamma starts, of the two ways to say it."""
    if gamma is not None and gain is not None:
        raise ValueError(f"expected gamma or gain, got gamma={gamma} and gain={gain}; leave one out")
    if gain is not None:
        return partial(by_shape, gain)
    return None if gamma is None else partial(constant, gamma)


def plain_weights(layers: dict[str, nn.Module]) -> Iterator[tuple[_End, nn.Parameter]]:
    """The weights of the layers, refused where they are no plain parameters."""
    for path, module in layers.items():
        found = weight_names(module)
        if not found:
            raise PatchError(
                f"{path} is a {type(module).__name__}, which has no weight that acts as a matrix; mend where="
            )
        for name in found:
            end = _End(path, module, name)
            chain = chain_of(module, name)
            if chain is not None:
                known = [type(one).__name__ for one in chain]
                raise PatchError(
                    f"{end.full} has the parametrization {', '.join(known)} already; remove that patch, apply sigma_reparam, "
                    f"then the other"
                )
            weight = module._parameters.get(name)
            if weight is None:
                raise PatchError(
                    f"{end.full} is not a parameter of its module, so that it cannot be computed on access"
                )
            if is_lazy(weight):
                raise PatchError(f"{end.full} has no shape yet; run the model once on a batch, then patch it")
            if is_sharded(weight):
                raise PatchError(f"{end.full} is sharded over processes; patch the model first, then shard it")
            if not weight.is_floating_point():
                raise PatchError(f"{end.full} is of {weight.dtype}, which cannot be trained; patch before quantization")
            yield end, weight


def _ends(model: nn.Module, wanted: set[int]) -> dict[int, list[_End]]:
    """All places of each wanted parameter in the model."""
    found: dict[int, list[_End]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) not in wanted:
                continue
            end = _End(path, module, name)
            if isinstance(module, ParametrizationList):
                raise PatchError(
                    f"{end.full} is tied to a weight to be patched and parametrized already; patch before that"
                )
            if getattr(module, "max_norm", None) is not None:
                raise PatchError(
                    f"{end.full} is tied and renormalized in place (max_norm), which would undo the patch; untie it"
                )
            found.setdefault(id(parameter), []).append(end)
    return found


@torch.no_grad()
def _bake(members: list[SigmaReparam], undo: ExitStack) -> None:
    if any(is_sharded(one.weight) for one in members):
        raise PatchError(
            "the weights are sharded over processes; gather a state dict into an unsharded patched model, bake that"
        )
    for one in members:
        one.weight.copy_(one.effective())
    undo.close()
