"""A norm on the queries and the keys of each head, before positions turn them and before their product.

Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", arXiv:2302.05442, section 2, with LayerNorm; with
RMSNorm, which is the default here, as in Qwen3 (arXiv:2505.09388) and Gemma 3: one weight (head_dim,) shared by all heads.
A patched Llama has the names and the function of Qwen3.

With RMSNorm and weights of 1 no logit exceeds sqrt(head_dim), whatever the projections; attention entropy can still be small.
Not for a pretrained model without training it further: the outputs change at once. A norm is no linear map, so that this
cannot be baked.
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tameformer.errors import PatchError
from tameformer.nn.norms import layer_norm, rms_norm
from tameformer.patch.adapters import QK_NORMS, Attention, Matrix
from tameformer.patch.attend import open_attention
from tameformer.patch.handle import PatchHandle
from tameformer.patch.multi_head import TAPS
from tameformer.patch.select import Selector
from tameformer.stabilizers.attention_parts import chosen_attentions
from tameformer.stabilizers.branch_norms import without_nested_tensors

KINDS: dict[str, Callable[[int], nn.RMSNorm | nn.LayerNorm]] = {"rms_norm": rms_norm, "layer_norm": layer_norm}
"""The norms by the names that settings have."""


def qk_norm(model: nn.Module, *, norm: str = "rms_norm", where: Selector | None = None) -> PatchHandle:
    """Normalize each head's queries and keys with a trained weight (head_dim,) that starts at 1.

    Where a model does not scale its dot products, as T5, the weights start at head_dim ** -0.25, which makes up for it.

    Args:
        model: Any model with layers that we know, before its optimizer exists and before it is distributed.
        norm: "rms_norm", or "layer_norm" with its bias.
        where: Takes attentions by name and module; None takes all.

    Raises:
        PatchError: The model has no such attention, or queries and keys are normalized already.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> qk_norm(model)
        PatchHandle(qk_norm, 2 places, 4 new parameters)
    """
    if norm not in KINDS:
        near = get_close_matches(norm, KINDS, n=1, cutoff=0.0)[0]
        raise PatchError(f"there is no norm {norm} for queries and keys; did you mean {near}?")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise PatchError(
            "the model is wrapped in DistributedDataParallel, which would not reduce the norms; patch, then wrap"
        )
    found = chosen_attentions(model, where)
    for attention in found:
        if attention.has_norms:
            raise PatchError(f"{attention.name} normalizes its queries or keys already")
    with ExitStack() as undo:
        without_nested_tensors(undo, model)
        parameters = [parameter for attention in found for parameter in _add(undo, attention, KINDS[norm])]
        kept = undo.pop_all()
    return PatchHandle(
        "qk_norm", [attention.name for attention in found], kept, new_parameters=parameters, settings={"norm": norm}
    )


def _add(undo: ExitStack, attention: Attention, kind: Callable[[int], nn.RMSNorm | nn.LayerNorm]) -> list[nn.Parameter]:
    """The norms of one attention; returns their parameters."""
    module, parameters = attention.module, []
    opened = isinstance(module, nn.MultiheadAttention)
    if opened:
        open_attention(undo, module, attention.name)
    for name, tap, matrix in zip(QK_NORMS, TAPS, (attention.query, attention.key), strict=True):
        weight = matrix.view()
        norm: Any = kind(attention.head_dim)
        norm.to(device=weight.device, dtype=weight.dtype).train(module.training)
        if attention.scale == 1:
            nn.init.constant_(norm.weight, attention.head_dim**-0.25)
        module.add_module(name, norm)
        undo.callback(module._modules.pop, name)
        place, columns = (module.get_submodule(tap), None) if opened else (matrix.module, matrix)
        undo.callback(place.register_forward_hook(_Normalize(module, name, attention.head_dim, columns)).remove)
        parameters += norm.parameters()
    return parameters


class _Normalize:
    """Normalizes a projection's output, or its columns for one of several maps; an object, for copies to have their own."""

    def __init__(self, attention: nn.Module, norm: str, head_dim: int, matrix: Matrix | None) -> None:
        self.attention, self.norm, self.head_dim = attention, norm, head_dim
        self.columns = slice(None) if matrix is None else slice(matrix.start, matrix.stop)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        norm, columns = getattr(self.attention, self.norm), self.columns
        normalized = normalize_heads(norm, output[..., columns], self.head_dim)
        if columns == slice(None):
            return normalized
        return torch.cat([output[..., : columns.start], normalized, output[..., columns.stop :]], -1)


def normalize_heads(norm: nn.RMSNorm | nn.LayerNorm, projected: Tensor, head_dim: int) -> Tensor:
    """Each head's part of (..., heads * head_dim) normalized, in the precision of the norm's weight also under autocast.

    Example:
        >>> normalize_heads(nn.RMSNorm(2, eps=0.0), torch.tensor([3.0, 4.0, 0.1, 0.1]), 2)
        tensor([0.8485, 1.1314, 1.0000, 1.0000], grad_fn=<ViewBackward0>)
    """
    heads = projected.view(
        *projected.shape[:-1], -1, head_dim
    )  # not unflatten, which does not compile in a function mode
    device = projected.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return norm(heads.to(norm.weight.dtype)).to(projected.dtype).reshape(projected.shape)
