"""Attention restricted to a neighbourhood (Vaswani et al. 2017, section 4; Beltagy et al. 2020, arXiv:2004.05150)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.nn.attention.attend import check_one_mask, fused_attention
from tameformer.shapes import Bool, Float, Mask


def window_mask(
    query_length: int, key_length: int, radius: int, *, is_causal: bool = False, device: torch.device | None = None
) -> Bool[Tensor, "1 1 query key"]:
    """Each query attends to the keys at most `radius` away; the last query stands at the last key.

    Example:
        >>> window_mask(3, 3, 1).int()[0, 0]
        tensor([[1, 1, 0],
                [1, 1, 1],
                [0, 1, 1]], dtype=torch.int32)
    """
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    mask = mask.triu(key_length - query_length - radius)
    return mask.tril(key_length - query_length + (0 if is_causal else radius))[None, None]


class WindowedAttention(nn.Module):
    """Scaled dot-product attention to the keys at most `radius` positions away, in the place of `DotProductAttention`.

    O(seq radius dim) time and O(seq radius) memory: queries are cut into blocks of `radius`, and each block meets its own
    keys and those of its neighbours. What softmax sees are the logits of those three blocks, (batch, heads, query, 3 radius),
    which is what probes see, too. Queries that are fewer than the keys (a cache) and masks that differ between queries
    (documents) go the long way, with the window as a mask on all pairs, and so do sequences of three blocks and fewer.

    Attributes:
        radius: distance of the farthest key, in positions.
        dropout: probability of dropping a weight while training.

    Raises:
        ValueError: `radius` is below 1.
    """

    def __init__(self, radius: int, *, dropout: float = 0.0):
        super().__init__()
        if radius < 1:
            raise ValueError(f"expected a radius of at least 1, got {radius}")
        self.radius = radius
        self.dropout = dropout

    def forward(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        value: Float[Tensor, "batch kv_heads key value_dim"],
        *,
        mask: Mask | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The values mixed for each query; zeros for a query that may attend to nothing in its window."""
        check_one_mask(mask, is_causal)
        lengths = query.shape[2], key.shape[2]
        dropout = self.dropout if self.training else 0.0
        if lengths[0] != lengths[1] or (mask is not None and mask.shape[2] > 1) or lengths[1] <= 3 * self.radius:
            window = window_mask(*lengths, self.radius, is_causal=is_causal, device=query.device)
            window = window if mask is None else window & mask
            return fused_attention(query, key, value, mask=window, dropout=dropout)
        served = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(served, 1), value.repeat_interleave(served, 1)
        return self._by_blocks(query, key, value, mask, is_causal, dropout)

    def _by_blocks(self, query, key, value, mask, is_causal, dropout):
        radius, length = self.radius, query.shape[2]
        queries = _blocks(query, radius) * query.shape[-1] ** -0.5
        keys, values = _with_neighbours(_blocks(key, radius)), _with_neighbours(_blocks(value, radius))
        logits = (queries @ keys.mT).flatten(2, 3)[:, :, :length]
        visible = self._visible(length, is_causal, query.device)
        if mask is not None:
            real = _with_neighbours(_blocks(mask.expand(*mask.shape[:3], length).mT, radius)).squeeze(-1)
            visible = visible & real.repeat_interleave(radius, 2)[:, :, :length]
        # The smallest number rather than -inf: a row of nothing else has a softmax with a gradient.
        weights = logits.masked_fill(~visible, torch.finfo(logits.dtype).min).softmax(-1)
        weights = F.dropout(weights.masked_fill(~visible, 0.0), dropout).to(value.dtype)
        mixed = _blocks(weights, radius) @ values
        return mixed.flatten(2, 3)[:, :, :length]

    def _visible(self, length, is_causal, device):
        """For each query which of the keys in its three blocks lie within the radius, and within the sequence."""
        queries = torch.arange(length, device=device)[:, None]
        keys = (queries // self.radius - 1) * self.radius + torch.arange(3 * self.radius, device=device)
        distance = keys - queries
        visible = (distance >= -self.radius) & (distance <= (0 if is_causal else self.radius))
        return (visible & (keys >= 0) & (keys < length))[None, None]

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        return f"radius={self.radius}, dropout={self.dropout}"


def _blocks(x: Tensor, size: int) -> Tensor:
    """(batch, heads, seq, dim) as (batch, heads, blocks, size, dim), the last block filled up with zeros."""
    missing = -x.shape[2] % size
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    return x.unflatten(2, (-1, size))


def _with_neighbours(blocks: Tensor) -> Tensor:
    """Each block between its neighbours, (batch, heads, blocks, 3 size, dim), zeros beyond the ends."""
    around = F.pad(blocks, (0, 0, 0, 0, 1, 1))
    return torch.cat([around[:, :, :-2], blocks, around[:, :, 2:]], dim=3)
