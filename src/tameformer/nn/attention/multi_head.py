"""Multi-head attention, with key-value heads that several query heads may share.

Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2; Ainslie et al. 2023, "GQA", arXiv:2305.13245.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.nn.attention.attend import Score, ScoreAttention
from tameformer.nn.attention.cache import AttentionCache
from tameformer.nn.attention.dot_product import DotProductAttention
from tameformer.nn.masks import causal_mask
from tameformer.nn.positions.relative import RelativePositions, distances
from tameformer.shapes import Float, Mask, Stream, Tokens


class MultiHeadAttention(nn.Module):
    """Self-attention, or cross-attention where a memory is given.

    Queries, keys and values have a linear layer each, so that a method can treat them apart.

    Args:
        dim: width of the stream.
        num_heads: query heads; divides `dim`.
        num_kv_heads: heads of keys and values, each serving num_heads / num_kv_heads query heads; None is num_heads.
        memory_dim: width of the memory in cross-attention; None is `dim`.
        bias: whether the four linear layers have one.
        dropout: probability of dropping an attention weight while training.
        positions: module with `forward(query_or_key, positions, *, start)` that turns queries and keys, or None.
        relative: what the distance of two positions changes in self-attention, or None.
        score: from queries and keys to logits, see `nn.attention.scores`; None is the scaled dot product.
        attend: all that stands between the heads and `out`, where a score alone does not say it (windowed, linear).

    Raises:
        ValueError: heads do not divide, `attend` is given beside `score` or `dropout`, or takes no bias for `relative`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        positions: nn.Module | None = None,
        relative: RelativePositions | None = None,
        score: Score | None = None,
        attend: nn.Module | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(dim, num_heads, num_kv_heads)
        if attend is not None and dropout:
            raise ValueError(f"expected dropout=0 beside attend, got {dropout}; give the dropout to attend")
        if attend is not None and score is not None:
            raise ValueError("expected score or attend, got both; give the score to ScoreAttention(score)")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        kv_dim, memory_dim = num_kv_heads * self.head_dim, dim if memory_dim is None else memory_dim
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(memory_dim, kv_dim, bias=bias)
        self.value = nn.Linear(memory_dim, kv_dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.positions = positions
        self.relative = relative
        if score is not None:
            attend = ScoreAttention(score, dropout=dropout)
        elif attend is None:
            scale = None if relative is None else relative.scale(self.head_dim)
            attend = DotProductAttention(scale=scale, dropout=dropout)
        if relative is not None and not isinstance(attend, DotProductAttention | ScoreAttention):
            raise ValueError(
                f"expected DotProductAttention or a score beside relative positions, got {type(attend).__name__}, "
                "which takes no bias; choose added or rotary positions"
            )
        self.attend = attend

    def forward(
        self,
        x: Stream,
        memory: Float[Tensor, "batch key memory_dim"] | None = None,
        *,
        mask: Mask | None = None,
        is_causal: bool = False,
        positions: Tokens | None = None,
        cache: AttentionCache | None = None,
    ) -> Stream:
        """Attends from `x` to itself, or to `memory`.

        Args:
            x: the stream.
            memory: what to attend to instead of `x`.
            mask: True where a query may attend to a key; says everything, so not together with `is_causal`.
            is_causal: each position attends to itself and to earlier ones, those in the cache included.
            positions: position of each token of `x`; None counts on from what the cache holds.
            cache: keys and values of earlier calls, extended in place; with `memory`, filled by the first call and
                read by the later ones, which then ignore `memory`.
        """
        query = self._split(self.query(x), self.num_heads)
        if memory is not None:
            key, value = self._memory(memory, cache)
        else:
            key, value = self._split(self.key(x), self.num_kv_heads), self._split(self.value(x), self.num_kv_heads)
            start = 0 if cache is None else cache.length
            if self.positions is not None:
                query = self.positions(query, positions, start=start)
                key = self.positions(key, positions, start=start)
            if cache is not None:
                key, value = cache.append(key, value)
            if is_causal and start:  # torch's is_causal counts from the first key, ours from the last
                mask = None if query.shape[2] == 1 else causal_mask(query.shape[2], key.shape[2], query.device)
                is_causal = False
        if self.relative is None or memory is not None:
            mixed = self.attend(query, key, value, mask=mask, is_causal=is_causal)
        else:
            distance = distances(query.shape[2], key.shape[2], positions, query.device)
            mixed = self._mix(self.relative, distance, query, key, value, mask=mask, is_causal=is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _mix(self, relative: RelativePositions, distance, query, key, value, **masks):
        bias = relative.bias(query, key, distance)
        if not relative.changes_values:
            return self.attend(query, key, value, bias=bias, **masks)
        attend = cast(DotProductAttention | ScoreAttention, self.attend)
        weights = attend.weights(query, key, bias=bias, **masks)
        weights = F.dropout(weights, attend.dropout, self.training).to(value.dtype)
        value = value.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        return weights @ value + relative.values(weights, distance)

    def _memory(self, memory, cache):
        if cache is not None and cache.length:
            return cache.read()
        key = self._split(self.key(memory), self.num_kv_heads)
        value = self._split(self.value(memory), self.num_kv_heads)
        return (key, value) if cache is None else cache.append(key, value)

    def _split(self, x, num_heads):
        return x.view(x.shape[0], x.shape[1], num_heads, self.head_dim).transpose(1, 2)


def check_heads(dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Refuses head counts that do not divide.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or `num_kv_heads` does not divide `num_heads`.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(
            f"expected num_heads that divides dim, got num_heads={num_heads} and dim={dim}; "
            f"choose one of {_divisors(dim)}"
        )
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"expected num_kv_heads that divides num_heads, got num_kv_heads={num_kv_heads} and num_heads={num_heads}; "
            f"choose one of {_divisors(num_heads)}"
        )


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
