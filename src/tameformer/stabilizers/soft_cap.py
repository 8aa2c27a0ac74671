"""Attention logits bent into (-cap, cap): cap tanh(logits / cap), on the scaled dot products.

Gemma Team 2024, "Gemma 2", arXiv:2408.00118, section 2, with 50; small logits stay what they are, and the gradient of one at
the cap is 0.42 of what it was. It comes before masks and before biases of positions: capped after it, a masked key would come
back with a weight.

The logits of all pairs are in memory, which torch's fused kernels avoid: not for long sequences. Not for models that compute
their own softmax. It changes the function, small as the change is for small logits, and cannot be baked into weights.
"""

import math
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tameformer.errors import PatchError
from tameformer.patch.attend import check_calls_torch, open_attention
from tameformer.patch.handle import PatchHandle
from tameformer.patch.select import Selector
from tameformer.shapes import Float
from tameformer.stabilizers.attention_parts import chosen_attentions
from tameformer.stabilizers.branch_norms import without_nested_tensors


def soft_capped(logits: Float[Tensor, "*axes"], cap: float) -> Float[Tensor, "*axes"]:
    """The logits as cap tanh(logits / cap): about themselves where small, never beyond the cap.

    Example:
        >>> soft_capped(torch.tensor([1.0, 50.0, -1e6]), 50.0)
        tensor([  0.9999,  38.0797, -50.0000])
    """
    return cap * torch.tanh(logits / cap)


def soft_cap(model: nn.Module, *, cap: float = 50.0, where: Selector | None = None) -> PatchHandle:
    """Keep the logits of every attention within (-cap, cap).

    Args:
        model: Any model with layers that we know.
        cap: The bound, above 0; for logits much smaller than it nothing changes.
        where: Takes attentions by name and module; None takes all.

    Raises:
        PatchError: The model has no such attention, computes its softmax itself, or is capped already.
        ValueError: `cap` is not a number above 0.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> soft_cap(model, cap=30.0)
        PatchHandle(soft_cap, 2 places, 0 new parameters)
    """
    if not 0 < cap < math.inf:
        raise ValueError(f"expected a finite cap above 0, got {cap}; Gemma 2 takes 50")
    found = chosen_attentions(model, where)
    for attention in found:
        check_calls_torch(attention.module, attention.name, "soft_cap")
    with ExitStack() as undo:
        without_nested_tensors(undo, model)
        for attention in found:
            opened = open_attention(undo, attention.module, attention.name)
            if opened.transform is not None:
                raise PatchError(f"soft_cap is on {attention.name} already; remove it first")
            opened.transform = _Cap(cap)
            undo.callback(setattr, opened, "transform", None)
        kept = undo.pop_all()
    return PatchHandle("soft_cap", [attention.name for attention in found], kept, settings={"cap": cap})


class _Cap:
    """`soft_capped` at one cap; an object, so that a copied or pickled model keeps it."""

    def __init__(self, cap: float) -> None:
        self.cap = cap

    def __call__(self, logits: Tensor) -> Tensor:
        return soft_capped(logits, self.cap)
