"""Attention in linear time (Katharopoulos et al. 2020, "Transformers are RNNs", arXiv:2006.16236).

The weight of a key is feature_map(query) · feature_map(key), divided by the sum over keys, so that the sums over keys can be
taken before the query comes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.nn.attention.attend import check_one_mask
from tameformer.shapes import Float, Mask

CHUNK = 64
"""Positions that are mixed with each other directly; between chunks a sum of key-value products is carried."""


def elu_plus_one(x: Tensor) -> Tensor:
    """ELU(x) + 1, positive everywhere: the paper's feature map (equation 7).

    Example:
        >>> elu_plus_one(torch.tensor([-100.0, 0.0, 2.0]))
        tensor([0., 1., 3.])
    """
    return F.elu(x) + 1


class LinearAttention(nn.Module):
    """Values mixed by weights feature_map(query) · feature_map(key), in the place of `DotProductAttention`.

    O(seq dim²) time and, causally, O(seq (64 + dim² / 64)) memory, as sums of key-value products are kept for each chunk of 64
    positions only. A mask that differs between queries (documents) goes the long way, with the weights of all pairs.
    There is no softmax: probes of entropy and logits name these layers as not seen. Sums are in float32 or wider.

    Attributes:
        feature_map: from queries and keys to features that are nowhere negative.
    """

    def __init__(self, *, feature_map: Callable[[Tensor], Tensor] = elu_plus_one):
        super().__init__()
        self.feature_map = feature_map

    def forward(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        value: Float[Tensor, "batch kv_heads key value_dim"],
        *,
        mask: Mask | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The values mixed for each query; zeros for a query that may attend to nothing."""
        check_one_mask(mask, is_causal)
        served = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(served, 1), value.repeat_interleave(served, 1)
        kind = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):  # long sums have no digits left in bfloat16
            mixed, total = self._sums(query.to(kind), key.to(kind), value.to(kind), mask, is_causal)
        return (mixed / total.clamp(min=torch.finfo(kind).tiny)).to(value.dtype)

    def _sums(self, query, key, value, mask, is_causal):
        """Sums over keys of weight · value, and of the weights."""
        query, key = self.feature_map(query), self.feature_map(key)
        if mask is not None and mask.shape[2] > 1:
            return _by_pairs(query, key, value, mask)
        if mask is not None:
            key = key * mask.expand(*mask.shape[:3], key.shape[2]).mT
        return (_causal if is_causal else _all)(query, key, value)


def _all(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Over all keys."""
    return query @ (key.mT @ value), query @ key.sum(2).unsqueeze(-1)


def _by_pairs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    weights = (query @ key.mT).masked_fill(~mask, 0.0)
    return weights @ value, weights.sum(-1, keepdim=True)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Over keys 0..i for query i; equally many of both."""
    length = query.shape[2]
    value = torch.cat([value, value.new_ones(*value.shape[:3], 1)], -1)  # the weights themselves are summed alongside
    query, key, value = (F.pad(x, (0, 0, 0, -length % CHUNK)).unflatten(2, (-1, CHUNK)) for x in (query, key, value))
    products = (key.mT @ value).cumsum(2)
    before = F.pad(products[:, :, :-1], (0, 0, 0, 0, 1, 0))  # of the chunks before each
    sums = query @ before + (query @ key.mT).tril() @ value
    sums = sums.flatten(2, 3)[:, :, :length]
    return sums[..., :-1], sums[..., -1:]
