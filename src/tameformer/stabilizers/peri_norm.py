"""A second norm, behind each branch of a Pre-norm model: x + norm(f(norm(x))).

Kim et al. 2025, "Peri-LN", arXiv:2502.02732; the same algebra as Sandwich-LN (Ding et al. 2021, arXiv:2105.13290).

Not for a pretrained model that must keep its outputs: the new norm gives each branch the size of its weight, which starts at
1. A norm is no linear map, so that this cannot be baked; the model keeps it, as Gemma does.
"""

import copy
from contextlib import ExitStack
from typing import Any

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Branch
from tameformer.patch.handle import PatchHandle
from tameformer.patch.select import Selector
from tameformer.stabilizers.branch_norms import without_nested_tensors
from tameformer.stabilizers.branch_scale import chosen_branches
from tameformer.stabilizers.norm_removal import NoNorm

NORM = "out_norm"
"""The new norm's name in the module that computes the branch."""


class _Normalize:
    """Normalizes what a module returns, alone or first in a tuple; an object, so that a copy of the model has its own."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        norm = getattr(module, NORM)
        return (norm(output[0]), *output[1:]) if isinstance(output, tuple) else norm(output)


def peri_norm(model: nn.Module, *, where: Selector | None = None) -> PatchHandle:
    """Add a norm of the kind that stands before each branch behind it, with weight 1 and bias 0.

    Args:
        model: A Pre-norm model with layers that we know, before its optimizer exists.
        where: Takes branches by the name and module of the linear map that ends them; None takes all.

    Raises:
        PatchError: The layers are unknown, not Pre-norm, have lost their norms, or have this already.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        >>> peri_norm(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        PatchHandle(peri_norm, 4 places, 8 new parameters)
    """
    found = chosen_branches(model, where)
    for branch in found:
        _check(branch)
    with ExitStack() as undo:
        without_nested_tensors(undo, model)
        norms = []
        for branch in found:
            assert branch.norm is not None
            norm = _fresh(branch.norm.module)
            branch.result.add_module(NORM, norm)
            undo.callback(branch.result._modules.pop, NORM)
            undo.callback(branch.result.register_forward_hook(_Normalize()).remove)
            norms.append(norm)
        kept = undo.pop_all()
    return PatchHandle(
        "peri_norm",
        [branch.name for branch in found],
        kept,
        new_parameters=[parameter for norm in norms for parameter in norm.parameters()],
    )


def _check(branch: Branch) -> None:
    if branch.placement != "pre" or branch.norm is None or isinstance(branch.norm.module, NoNorm):
        raise PatchError(
            f"peri_norm needs Pre-norm layers, but {branch.name} is {branch.placement}-norm or has lost its norm"
        )
    if NORM in branch.result._modules:
        raise PatchError(f"peri_norm is on {branch.name} already; remove it first")


def _fresh(norm: nn.Module) -> nn.Module:
    """A norm of the same kind with parameters of its own, weight 1 and bias 0."""
    fresh = copy.deepcopy(norm)
    fresh._forward_hooks.clear()
    fresh._forward_pre_hooks.clear()
    for name, parameter in fresh.named_parameters():
        nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return fresh
