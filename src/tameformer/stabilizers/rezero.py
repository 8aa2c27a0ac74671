"""Residual branches that start closed: x + a f(x) with one learned number a = 0 a layer.

Bachlechner et al. 2020, "ReZero is All You Need", arXiv:2003.04887; with one number a branch, De and Smith 2020, "Batch
Normalization Biases Residual Blocks", arXiv:2002.10444 (SkipInit).

Differs from the paper: the norms stay unless `remove_norms` is asked for, so that the folded model is one of the same class.
Not for a pretrained model: at the default start no layer does anything.
"""

from contextlib import ExitStack
from typing import Literal

import torch
from torch import nn

from tameformer.patch import unwrapped
from tameformer.patch.handle import PatchHandle
from tameformer.patch.select import Selector
from tameformer.stabilizers.branch_norms import remove_branch_norms
from tameformer.stabilizers.branch_scale import OutputScale, ScaledBranches, bake_products, chosen_branches


def rezero(
    model: nn.Module,
    *,
    init: float = 0.0,
    per: Literal["layer", "branch"] = "layer",
    remove_norms: bool = False,
    where: Selector | None = None,
) -> PatchHandle:
    """Multiply residual branches by trained numbers that start at 0.

    At the start a layer passes its input on, through its norm where that stands behind the sum.

    Args:
        model: Any model with layers that we know, before its optimizer exists.
        init: Where the numbers start.
        per: One number a layer, shared by its two or three branches as in the released code, or one a branch.
        remove_norms: Whether to take the norms of the branches out, as the paper does; a norm at the end of a stack stays.
            Baked, the model keeps no norm there, and its state dict no entries of one.
        where: Takes branches by the name and module of the linear map that ends them; None takes all.

    Raises:
        PatchError: The model has no such branch, or the method is on it already.
        ValueError: `per` is something else.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> rezero(model)
        PatchHandle(rezero, 4 places, 2 new parameters)
    """
    if per not in ("layer", "branch"):
        raise ValueError(f"expected per to be 'layer' or 'branch', got {per!r}")
    found = chosen_branches(model, where)
    norms = ExitStack()
    with ExitStack() as undo:
        scaled, homes = ScaledBranches("rezero", undo), dict[str, OutputScale]()
        for branch in found:
            key = branch.block if per == "layer" else branch.name
            weight = getattr(branch.output.module, branch.output.weight)
            fresh = nn.Parameter(torch.tensor([init], dtype=weight.dtype, device=weight.device))
            homes.setdefault(key, scaled.scale(branch, homes.get(key, fresh)))
        undo.push(norms)
        if remove_norms:
            remove_branch_norms(norms, unwrapped(model), found, "rezero")
        kept = undo.pop_all()

    def bake() -> None:
        scaled.check_foldable(model)
        norms.pop_all()  # baked, the norms stay out
        bake_products(scaled, model, kept)

    return PatchHandle(
        "rezero",
        [branch.output.name for branch in found],
        kept,
        bake=bake,
        new_parameters=[home.scale for home in homes.values()],
        settings={"init": init, "per": per, "remove_norms": remove_norms},
    )
