"""Factors on the shortcuts of Post-norm layers that let deep stacks train: norm(w * x + f(x)).

Liu et al. 2020, "Understanding the Difficulty of Training Transformers", arXiv:2004.08249 (Admin); without a profile, the
follow-up in the authors' `admin-torch`.

Differs from the paper: factors by the recursion of the authors' code, see `shortcut_profile`. The first factor of a stack
is 1, also without a profile, and not trained unless asked for: another one on bare embeddings could not be folded away exactly.
Not for Pre-norm.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Branch, branches, num_branches, stacks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.unwrapped import unwrapped
from tameformer.stabilizers.branch_scale import ScaledBranches
from tameformer.stabilizers.shortcut_profile import Masks, call_with, profile, real_tokens
from tameformer.stabilizers.shortcut_scale import (
    SCALE,
    check_post_norm,
    fix_shortcut,
    norm_of,
    plan_fold,
    train_shortcuts,
)

Growth = Literal["log", "constant", "linear"]


def profile_free_scale(num_branches: int, growth: Growth = "log") -> float:
    """One factor for all branches of a stack, after which a weight change moves the output by O(growth of depth).

    "log": sqrt((n + 1) / ln(n + 1) - 1), "constant": sqrt(n), "linear": 1, which is plain Post-norm.

    Example:
        >>> [round(profile_free_scale(n), 3) for n in (12, 36, 200)]
        [2.017, 3.041, 6.075]
    """
    if growth not in ("log", "constant", "linear"):
        raise ValueError(f"expected growth to be 'log', 'constant' or 'linear', got {growth!r}")
    n = num_branches
    return {"log": math.sqrt((n + 1) / math.log(n + 1) - 1), "constant": math.sqrt(n), "linear": 1.0}[growth]


def admin(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    trainable: bool = True,
    train_first: bool = False,
    growth: Growth = "log",
    scales: Sequence[float] | None = None,
    call: Callable[[nn.Module, Any], Any] = call_with,
    mask: Callable[[Any], Masks] = real_tokens,
) -> PatchHandle:
    """Scale the shortcuts of a Post-norm model; its outputs change, as deep Post-norm's must.

    Args:
        model: Post-norm encoder, decoder or both, before its optimizer exists, not compiled yet.
        batches: A few batches to profile, in one pass each; None takes one factor for all branches of a stack but the first,
            from its depth.
        trainable: Whether factors are trained, by channel (dim,); otherwise they are constants that cost nothing.
        train_first: Whether to train the first factor of each stack too, as the paper does; it cannot be baked then.
        growth: Without batches, how the output's change may grow with depth.
        scales: The factors themselves, one a branch, as in the handle's `settings`; no profile is taken.
        call: From model and batch to a forward pass.
        mask: From a batch to True at real tokens, by side; the default reads the usual names in a mapping.

    Raises:
        PatchError: The layers are unknown, not Post-norm, share their weights, or are scaled already.
        ValueError: Both `batches` and `scales` are given, no batch comes, or the factors are not one a branch above 0.
        NonFiniteError: A variance in the profile is NaN or infinite.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> admin(model, [torch.randn(2, 5, 8)])
        PatchHandle(admin, 4 places, 3 new parameters)
    """
    if batches is not None and scales is not None:
        raise ValueError("expected batches or scales, got both; leave batches out to apply known factors")
    model = unwrapped(model)
    found = branches(model)
    check_post_norm(found, "admin")
    shared = [branch.block for branch in found if branch.uses > 1]
    if shared:
        raise PatchError(f"admin gives each step through the stack its own factor, but {shared[0]} stands at several")
    firsts = {stack[0].name for stack in stacks(found).values()}
    if scales is not None:
        values = _given(found, scales)
    elif batches is not None:
        values = profile(model, found, batches, call=call, mask=mask)
    else:
        values = {
            branch.name: 1.0 if branch.name in firsts else profile_free_scale(num_branches(stack), growth)
            for stack in stacks(found).values()
            for branch in stack
        }
    trained: list[tuple[Branch, nn.Parameter]] = []
    with ExitStack() as undo:
        scaled = ScaledBranches("admin", undo)
        for branch in found:
            value, weight = values[branch.name], norm_of(branch).weight
            if trainable and (train_first or branch.name not in firsts):
                like: dict[str, Any] = {} if weight is None else {"dtype": weight.dtype, "device": weight.device}
                trained.append((branch, nn.Parameter(torch.full((branch.dim,), value, **like))))
            elif value != 1:
                fix_shortcut(undo, scaled, branch, value)
        train_shortcuts(undo, model, trained)
        kept = undo.pop_all()

    def scale_now(branch: Branch) -> Tensor | float:
        own = norm_of(branch)._parameters.get(SCALE)
        return values[branch.name] if own is None else own

    def bake() -> None:
        scaled.check_foldable(model)
        folds = [plan_fold(model, stack, [scale_now(b) for b in stack], "admin") for stack in stacks(found).values()]
        kept.close()
        for fold in folds:
            fold()

    return PatchHandle(
        "admin",
        [branch.norm.name for branch in found if branch.norm is not None],
        kept,
        bake=bake,
        new_parameters=[parameter for _, parameter in trained],
        settings={"trainable": trainable, "train_first": train_first, "scales": [values[b.name] for b in found]},
    )


def _given(found: Sequence[Branch], scales: Sequence[float]) -> dict[str, float]:
    if len(scales) != len(found) or not all(0 < scale < math.inf for scale in scales):
        raise ValueError(f"expected {len(found)} factors above 0, one a branch, got {list(scales)}")
    return {branch.name: float(scale) for branch, scale in zip(found, scales, strict=True)}
