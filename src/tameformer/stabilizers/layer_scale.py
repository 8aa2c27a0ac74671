"""A small learned factor on every channel of every residual branch: x + diag(s) f(x).

Touvron et al. 2021, "Going deeper with Image Transformers", arXiv:2103.17239 (LayerScale), section 2.2.

The factor multiplies the branch's last weight and bias, so that baking it is exact. Not for a pretrained model at its
default start, which closes all branches nearly: there `init=1.0` leaves the outputs as they are.
"""

from contextlib import ExitStack

import torch
from torch import nn

from tameformer.patch.adapters import num_layers, stacks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.select import Selector
from tameformer.stabilizers.branch_scale import ScaledBranches, bake_products, chosen_branches


def start_scale(num_layers: int) -> float:
    """The paper's starting value for a stack of so many layers.

    Example:
        >>> [start_scale(depth) for depth in (12, 24, 36)]
        [0.1, 1e-05, 1e-06]
    """
    return 0.1 if num_layers <= 18 else 1e-5 if num_layers <= 24 else 1e-6


def layer_scale(model: nn.Module, *, init: float | None = None, where: Selector | None = None) -> PatchHandle:
    """Give each residual branch a trained factor (dim,), by which it starts multiplied.

    Args:
        model: Any model with layers that we know, before its optimizer exists.
        init: Where the factors start; 1 leaves the outputs as they are; None is `start_scale` of the stack's depth.
        where: Takes branches by the name and module of the linear map that ends them; None takes all.

    Raises:
        PatchError: The model has no such branch, or the method is on it already.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> layer_scale(model)
        PatchHandle(layer_scale, 4 places, 4 new parameters)
    """
    found = chosen_branches(model, where)
    depth = {name: num_layers(stack) for name, stack in stacks(found).items()}
    with ExitStack() as undo:
        scaled, parameters = ScaledBranches("layer_scale", undo), []
        for branch in found:
            value = start_scale(depth[branch.stack]) if init is None else init
            weight = getattr(branch.output.module, branch.output.weight)
            scale = nn.Parameter(torch.full((branch.dim,), value, dtype=weight.dtype, device=weight.device))
            scaled.scale(branch, scale)
            parameters.append(scale)
        kept = undo.pop_all()
    return PatchHandle(
        "layer_scale",
        [branch.output.name for branch in found],
        kept,
        bake=lambda: bake_products(scaled, model, kept),
        new_parameters=parameters,
        settings={"init": init},
    )
