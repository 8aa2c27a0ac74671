"""Attention as one recipe: softmax(score(query, key)) value, whatever the score (Vaswani et al. 2017, arXiv:1706.03762).

Its four ingredients are queries, keys, values and a score. As a set operation it is equivariant in the queries and
invariant in the pairs of keys and values; each result is a convex combination of the values.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.nn.attention.scores.dot import DotProducts, scaled_dot
from tameformer.shapes import Bool, Float, Mask

Score = Callable[[Tensor, Tensor], Tensor]
"""From queries (*batch, query, query_dim) and keys (*batch, key, key_dim) to logits (*batch, query, key)."""


@runtime_checkable
class IsDotProduct(Protocol):
    """A score that is a dot product in disguise, for which the fused kernels can be used."""

    def as_dot_product(self, query: Tensor, key: Tensor) -> DotProducts:
        """Queries and keys whose dot products have the same softmax."""
        ...


def attend(
    query: Float[Tensor, "*batch query query_dim"],
    key: Float[Tensor, "*kv_batch key key_dim"],
    value: Float[Tensor, "*kv_batch key value_dim"],
    *,
    score: Score = scaled_dot,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Float[Tensor, "*batch query value_dim"]:
    """softmax(score(query, key) + bias) value; zeros for a query that may attend to nothing.

    Scores that are dot products in disguise (scaled dot, dot, general, Gaussian) run in torch's fused kernels, without all
    logits in memory, unless `bias` is as large as they are. Others are written out: the logits and weights of all pairs
    are in memory, and what else a score needs its docstring says.

    Args:
        query: what asks.
        key: what answers; with an axis of heads in front of the sequence, each of its heads may serve several neighbouring
            ones of the queries.
        value: what is mixed, one for each key.
        score: from queries and keys to logits; see `tameformer.nn.attention.scores`.
        mask: True where a query may attend to a key; broadcasts to the logits.
        bias: added to the logits; broadcasts to them.
        is_causal: query i attends to keys 0..i; excludes `mask`.
        dropout: probability of dropping a weight.

    Raises:
        ValueError: both `mask` and `is_causal` are given.

    Example:
        >>> query, key = torch.tensor([[1.0]]), torch.tensor([[0.0], [9.0]])
        >>> attend(query, key, torch.tensor([[5.0], [7.0]]), score=lambda q, k: -(q - k.T).abs())
        tensor([[5.0018]])
    """
    check_one_mask(mask, is_causal)
    if isinstance(score, IsDotProduct):
        key, value = (_with_leading(query, tensor) for tensor in (key, value))
        query, key, scale, key_bias = score.as_dot_product(query, key)
        bias = key_bias if bias is None else bias if key_bias is None else bias + key_bias
        return fused_attention(
            query, key, value, mask=mask, bias=bias, is_causal=is_causal, dropout=dropout, scale=scale
        )
    weights = attention_weights(query, key, score=score, mask=mask, bias=bias, is_causal=is_causal)
    return F.dropout(weights, dropout).to(value.dtype) @ _with_leading(query, value)


def attention_weights(
    query: Float[Tensor, "*batch query query_dim"],
    key: Float[Tensor, "*kv_batch key key_dim"],
    *,
    score: Score = scaled_dot,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "*batch query key"]:
    """softmax(score(query, key) + bias) of all pairs, in float32 or wider: to look at, and for scores without a kernel.

    Arguments and errors are those of `attend`. The weights of a query that may attend to nothing are zeros.

    Example:
        >>> attention_weights(torch.zeros(2, 4), torch.ones(2, 4), is_causal=True)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    check_one_mask(mask, is_causal)
    logits = score(query, _with_leading(query, key))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if bias is not None:
        logits = logits + bias
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return _softmax(logits)
    # The smallest number rather than -inf: a row of nothing else has a softmax with a gradient.
    weights = _softmax(logits.masked_fill(~mask, torch.finfo(logits.dtype).min))
    return weights if is_causal else weights.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def fused_attention(
    query: Float[Tensor, "*batch query head_dim"],
    key: Float[Tensor, "*kv_batch key head_dim"],
    value: Float[Tensor, "*kv_batch key value_dim"],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "*batch query value_dim"]:
    """`scaled_dot_product_attention` with a mask, a bias or both; `scale` None is 1 / sqrt(head_dim)."""
    if bias is not None:
        if is_causal:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        bias = bias.to(query.dtype)
        bias = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
        if bias.shape[-2] != query.shape[-2]:  # torch's kernels differ in what they broadcast
            bias = bias.expand(*bias.shape[:-2], query.shape[-2], key.shape[-2])
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask if bias is None else bias,
        dropout_p=dropout,
        is_causal=is_causal and bias is None,
        scale=scale,
        enable_gqa=query.dim() > 3 and key.shape[-3] != query.shape[-3],
    )


class ScoreAttention(nn.Module):
    """`attend` with a score of its own, in the place of `DotProductAttention`.

    Example:
        >>> from tameformer.nn.attention import AdditiveScore, MultiHeadAttention
        >>> layer = MultiHeadAttention(32, 4, score=AdditiveScore(4, 8))
        >>> layer(torch.randn(2, 5, 32), is_causal=True).shape
        torch.Size([2, 5, 32])
    """

    def __init__(self, score: Score, *, dropout: float = 0.0):
        super().__init__()
        self.score = score
        self.dropout = dropout

    def forward(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        value: Float[Tensor, "batch kv_heads key value_dim"],
        *,
        mask: Mask | None = None,
        bias: Float[Tensor, "#batch #heads #query #key"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The values mixed for each query."""
        dropout = self.dropout if self.training else 0.0
        return attend(query, key, value, score=self.score, mask=mask, bias=bias, is_causal=is_causal, dropout=dropout)

    def weights(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        *,
        mask: Mask | None = None,
        bias: Float[Tensor, "#batch #heads #query #key"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query key"]:
        """What the values are mixed with, before dropout."""
        return attention_weights(query, key, score=self.score, mask=mask, bias=bias, is_causal=is_causal)


def check_one_mask(mask: Tensor | None, is_causal: bool) -> None:
    """Refuses a mask beside `is_causal`."""
    if is_causal and mask is not None:
        raise ValueError(
            "expected either mask or is_causal=True, got both; put the causal part into the mask: "
            "mask & causal_mask(query_length, key_length)"
        )


def _softmax(logits: Tensor) -> Tensor:
    """Over the keys, from (batch, heads, query, key), by which whoever watches knows attention from any other softmax."""
    if logits.dim() == 4:
        return logits.softmax(-1)
    # Without an axis of heads there is one; further leading axes are sequences.
    headed = logits.unsqueeze(-3) if logits.dim() < 4 else logits
    return headed.reshape(-1, *headed.shape[-3:]).softmax(-1).view(logits.shape)


def _with_leading(query: Tensor, tensor: Tensor) -> Tensor:
    """Keys or values with the leading axes of the queries: a head that serves several is repeated."""
    if query.dim() < 3 or query.shape[:-2] == tensor.shape[:-2]:
        return tensor
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)
