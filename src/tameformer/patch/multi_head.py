"""`torch.nn.MultiheadAttention` written out, so that its queries, keys and logits can be reached."""

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.errors import PatchError

TAPS = ("q_tap", "k_tap")
"""The modules without parameters that projected queries and keys, (seq, batch, dim), pass through: a place for hooks."""


def check_can_open(module: nn.MultiheadAttention, name: str) -> None:
    """Refuse what `multi_head_attention` does not do.

    Raises:
        PatchError: The module has keys that no projection gives, or a `forward` of its own.
    """
    if type(module).forward is not nn.MultiheadAttention.forward or "forward" in module.__dict__:
        raise PatchError(f"{name} is a MultiheadAttention with a forward of its own, which cannot be opened")
    if module.bias_k is not None or module.add_zero_attn:
        raise PatchError(f"{name} adds keys of its own (add_bias_kv or add_zero_attn), which no projection gives")


@runtime_checkable
class Attends(Protocol):
    """What stands between projected heads and the output projection; both take what torch's function takes."""

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """The mixed values."""
        ...

    def attend_with_weights(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The mixed values and the weights that they were mixed with, (batch, heads, query, key)."""
        ...


def multi_head_attention(
    module: nn.MultiheadAttention,
    attention: Attends,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `module(query, ...)` returns, by the same products, with the taps and `attention` between them.

    The arguments from `query` on are those of the module. One result differs: a query that may attend to nothing gives
    zeros also where weights are asked for, not NaN.

    Raises:
        ValueError: `is_causal` comes without the mask that it is a hint at, or a tensor is nested.
    """
    if query.is_nested or key.is_nested:
        raise ValueError("expected padded tensors, got nested ones; give TransformerEncoder enable_nested_tensor=False")
    if is_causal and attn_mask is None:
        raise ValueError("expected attn_mask beside is_causal, which is a hint at what it holds, got None")
    is_batched, batch_axis = query.dim() == 3, 0 if module.batch_first else 1
    if not is_batched:
        batch_axis, key_padding_mask = 1, None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    queries, keys, values = _projected(module, query, key, value, batch_axis)
    queries, keys = module.get_submodule(TAPS[0])(queries), module.get_submodule(TAPS[1])(keys)
    heads = [part.view(*part.shape[:2], module.num_heads, -1).permute(1, 2, 0, 3) for part in (queries, keys, values)]
    # torch lets the hint stand for the mask only where nothing else masks.
    is_hint_enough = is_causal and key_padding_mask is None and not need_weights
    given = {
        "attn_mask": None if is_hint_enough else _mask(attn_mask, key_padding_mask, heads[0]),
        "dropout_p": module.dropout if module.training else 0.0,
    }
    weights = None
    if need_weights:
        mixed, weights = attention.attend_with_weights(*heads, **given)
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = attention.attend(*heads, **given, is_causal=is_hint_enough)
    mixed = mixed.permute(2, 0, 1, 3).flatten(2)
    # One matrix of rows, as torch has it: the last bits depend on the shape of a product.
    rows = F.linear(mixed.flatten(0, 1), module.out_proj.weight, module.out_proj.bias)
    output = rows.view(mixed.shape)
    if not is_batched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output.transpose(0, 1) if module.batch_first else output, weights


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, batch_axis: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (seq, batch, dim); from one product where they read the same, as in torch."""
    dim, weight, bias = module.embed_dim, module.in_proj_weight, module.in_proj_bias
    same, rest = query is key and key is value, key is value
    query, key, value = (
        tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.transpose(0, 1) if batch_axis == 0 else tensor
        for tensor in (query, key, value)
    )
    biases = (None, None, None) if bias is None else bias.chunk(3)
    if weight is None:
        maps = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    elif same:
        queries, keys, values = F.linear(query, weight, bias).chunk(3, -1)
        return queries, keys, values
    elif rest:
        keys, values = F.linear(key, weight[dim:], None if bias is None else bias[dim:]).chunk(2, -1)
        return F.linear(query, weight[:dim], biases[0]), keys, values
    else:
        maps = weight.chunk(3)
    queries, keys, values = map(F.linear, (query, key, value), maps, biases)
    return queries, keys, values


def _mask(mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
    """Both masks of `MultiheadAttention`, in which True forbids, as one: True allows, or floats to be added."""
    if mask is not None:
        mask = mask.view(-1, query.shape[1], *mask.shape[1:]) if mask.dim() == 3 else mask[None, None]
    padding = None if padding is None else padding[:, None, None, :]
    masks = [part for part in (mask, padding) if part is not None]
    if not masks:
        return None
    if all(part.dtype == torch.bool for part in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    floats = [part if part.dtype != torch.bool else _float_mask(part, query.dtype) for part in masks]
    return (floats[0] if len(floats) == 1 else floats[0] + floats[1]).to(query.dtype)


def _float_mask(forbidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(forbidden, dtype=dtype).masked_fill(forbidden, -torch.inf)
