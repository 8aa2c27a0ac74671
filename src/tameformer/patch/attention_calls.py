"""Calls of attention in one form, whichever of torch's functions a model made them with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tameformer.segments import segment_softmax

_SEQUENCES_OF_ONE_QUERY = 32


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention, cut to its first sequences and detached from the graph.

    Either `query` and `key` are there, or `logits`, where a model computed its own softmax. Where queries see neighbourhoods of
    their own (the nodes of a graph), the logits are (edges, heads), and `groups` and `num_queries` come with them.
    """

    layer: str
    """Name of the innermost module with parameters that made the call, in the observed model."""
    query: Tensor | None = None
    """(batch, heads, query, head_dim)."""
    key: Tensor | None = None
    """(batch, kv_heads, key, head_dim); each serves `heads / kv_heads` neighbouring query heads."""
    value: Tensor | None = None
    """(batch, kv_heads, key, value_dim)."""
    mask: Tensor | None = None
    """Boolean, True = may attend, or a float added to the logits; broadcasts to (batch, heads, query, key)."""
    is_causal: bool = False
    """Query i sees the keys up to i only."""
    scale: float | None = None
    """Factor on the dot products; None is 1/sqrt(head_dim)."""
    logits: Tensor | None = None
    """(batch, heads, query, key), masked entries at the smallest number of their type or -inf; (edges, heads) with groups."""
    groups: Tensor | None = None
    """The query of each row of logits, (edges,)."""
    num_queries: int = 0
    """How many queries there are, those without an edge included; read with groups only."""

    @property
    def device(self) -> torch.device:
        """Where it was computed."""
        tensor = self.query if self.query is not None else self.logits
        assert tensor is not None
        return tensor.device


Reader = Callable[[str, int | None, tuple[Any, ...], Mapping[str, Any]], AttentionCall | None]
"""From layer, number of sequences, and a function's arguments to the call; None when it is no attention."""


def _scaled_dot_product(
    layer: str, sequences: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AttentionCall | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given["query"].is_nested:
        return None
    sequences = _looked_at(given["query"].shape[-2], sequences)
    query, key, value = (_heads_form(given[name], sequences) for name in ("query", "key", "value"))
    if query is None or key is None or value is None:
        return None
    mask = given.get("attn_mask")
    if mask is not None and given["query"].dim() == mask.dim() == 3:
        mask = mask.unsqueeze(1)
    return AttentionCall(
        layer,
        query,
        key,
        value,
        mask=None if mask is None else _first(_four(mask), sequences),
        is_causal=bool(given.get("is_causal", False)),
        scale=given.get("scale"),
    )


def _multi_head(
    layer: str, sequences: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AttentionCall | None:
    """`torch.nn.functional.multi_head_attention_forward`: the projections are repeated for the sequences asked for."""
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k")
    names += ("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training")
    names += ("key_padding_mask", "need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("bias_k") is not None or given.get("add_zero_attn") or given.get("static_k") is not None:
        return None  # keys that no projection of the input gives
    inputs = [given[name] for name in ("query", "key", "value")]
    if inputs[0].dim() == 2:
        inputs = [tensor.unsqueeze(1) for tensor in inputs]
    sequences = _looked_at(inputs[0].shape[0], sequences)
    inputs = [tensor[:, :sequences].detach() for tensor in inputs]
    if given.get("use_separate_proj_weight"):
        weights = [given[f"{name}_proj_weight"].detach() for name in "qkv"]
    else:
        weights = list(given["in_proj_weight"].detach().chunk(3))
    bias = given.get("in_proj_bias")
    biases = [None] * 3 if bias is None else list(bias.detach().chunk(3))
    heads = given["num_heads"]
    query, key, value = (
        F.linear(tensor, weight, offset).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)
        for tensor, weight, offset in zip(inputs, weights, biases, strict=True)
    )
    mask = _multi_head_mask(given, batch=inputs[0].shape[1], heads=heads, sequences=sequences)
    return AttentionCall(
        layer, query, key, value, mask=mask, is_causal=bool(given.get("is_causal", False)) and mask is None
    )


def _multi_head_mask(given: Mapping[str, Any], *, batch: int, heads: int, sequences: int | None) -> Tensor | None:
    """The two masks of `MultiheadAttention`, in which True forbids, as one in which True allows."""
    padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
    parts = []
    if padding is not None:
        padding = padding[None] if padding.dim() == 1 else padding
        parts.append(padding[:sequences, None, None, :])
    if mask is not None:
        parts.append(mask.unflatten(0, (-1, heads))[:batch] if mask.dim() == 3 else mask[None, None])
    allowed = [~part if part.dtype == torch.bool else part for part in parts]
    if len(allowed) < 2:
        return allowed[0] if allowed else None
    if allowed[0].dtype == allowed[1].dtype == torch.bool:
        return allowed[0] & allowed[1]
    floats = [
        part if part.dtype != torch.bool else torch.zeros_like(part, dtype=torch.float32).masked_fill(~part, -torch.inf)
        for part in allowed
    ]
    return floats[0] + floats[1]


def _softmax(
    layer: str, sequences: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AttentionCall | None:
    """A softmax over the last of four axes is taken for attention: (batch, heads, query, key)."""
    given = {**dict(zip(("input", "dim"), args, strict=False)), **kwargs}
    logits = given["input"]
    if logits.dim() != 4 or given.get("dim") not in (-1, 3) or not logits.is_floating_point():
        return None
    return AttentionCall(layer, logits=_first(logits.detach(), _looked_at(logits.shape[2], sequences)))


def _segment_softmax(
    layer: str, sequences: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> AttentionCall:
    """Attention along edges: all of it, because a graph is one sequence."""
    given = {**dict(zip(("logits", "groups", "count"), args, strict=False)), **kwargs}
    return AttentionCall(layer, logits=given["logits"].detach(), groups=given["groups"], num_queries=given["count"])


READERS: dict[Any, Reader] = {
    F.scaled_dot_product_attention: _scaled_dot_product,
    F.multi_head_attention_forward: _multi_head,
    F.softmax: _softmax,
    torch.softmax: _softmax,
    torch.Tensor.softmax: _softmax,
    segment_softmax: _segment_softmax,
}
"""Which functions make attention, and how each is read."""


def _heads_form(tensor: Tensor, sequences: int | None) -> Tensor | None:
    """(batch, heads, seq, dim) of the first sequences; a missing batch or head axis is 1. None for other layouts."""
    if tensor.is_nested or not 2 <= tensor.dim() <= 4:
        return None
    tensor = tensor.detach()
    tensor = tensor.unsqueeze(1) if tensor.dim() == 3 else tensor
    return _first(_four(tensor), sequences)


def _four(tensor: Tensor) -> Tensor:
    """Four axes: missing leading ones are 1."""
    return tensor.detach().reshape((1,) * (4 - tensor.dim()) + tensor.shape) if tensor.dim() < 4 else tensor.detach()


def _looked_at(num_queries: int, sequences: int | None) -> int | None:
    """How many sequences; more where each asks once (pooling, a recurrent decoder), and one alone would say little."""
    return sequences if sequences is None or num_queries > 1 else sequences * _SEQUENCES_OF_ONE_QUERY


def _first(tensor: Tensor, sequences: int | None) -> Tensor:
    return tensor[:sequences] if sequences is not None and tensor.shape[0] > 1 else tensor
