"""Heads that share their queries and keys (Cordonnier et al. 2020, "Collaborate Instead of Concatenate", arXiv:2006.16362).

Differs from the paper: `from_heads` takes a trained layer over exactly; the tensor decomposition that then makes the shared
queries and keys narrower is not here.
"""

import torch
from torch import Tensor, nn

from tameformer.nn.attention.cache import AttentionCache
from tameformer.nn.attention.dot_product import DotProductAttention
from tameformer.nn.attention.multi_head import MultiHeadAttention, check_heads
from tameformer.nn.masks import causal_mask
from tameformer.shapes import Float, Mask, Stream, Tokens


class CollaborativeAttention(nn.Module):
    """Multi-head attention in which all heads read one set of query and key features, each through its own mixing vector.

    The logit of head h is (x shared_query · diag(mixing[h]) · y shared_key + y content_bias[h]) / sqrt(head_dim): with
    shared_dim < dim there are fewer weights, and what heads have in common is there once. Values and output are those of
    ordinary heads. The fused kernels run with queries and keys `shared_dim` wide for each head, so that with
    shared_dim > head_dim the time grows by that factor. Positions come with the stream only: nothing is turned here.

    Args:
        dim: width of the stream.
        num_heads: heads; divides `dim`.
        shared_dim: width of the shared queries and keys; None is `dim`.
        memory_dim: width of the memory in cross-attention; None is `dim`.
        bias: whether the linear layers of values and output have one, and heads a content bias.
        dropout: probability of dropping an attention weight while training.

    Example:
        >>> layer = CollaborativeAttention(32, 4, shared_dim=16)
        >>> layer(torch.randn(2, 5, 32), is_causal=True).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_dim: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_heads(dim, num_heads, num_heads)
        shared_dim, memory_dim = dim if shared_dim is None else shared_dim, dim if memory_dim is None else memory_dim
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.shared_query = nn.Linear(dim, shared_dim, bias=False)
        self.shared_key = nn.Linear(memory_dim, shared_dim, bias=False)
        self.mixing = nn.Parameter(1 + 0.02 * torch.randn(num_heads, shared_dim))
        self.content_bias = nn.Parameter(torch.zeros(num_heads, memory_dim)) if bias else None
        self.value = nn.Linear(memory_dim, dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.attend = DotProductAttention(scale=self.head_dim**-0.5, dropout=dropout)

    @classmethod
    def from_heads(cls, layer: MultiHeadAttention) -> "CollaborativeAttention":
        """The same function as ordinary heads: shared_dim is dim, and each head mixes only its own features (section 3.2).

        The queries' bias becomes the content bias; that of the keys adds the same to all logits of a query.

        Raises:
            ValueError: the layer has positions, shared key-value heads, or a score of its own.
        """
        attend = layer.attend
        if (
            not isinstance(attend, DotProductAttention)
            or attend.scale
            or layer.positions
            or layer.relative
            or layer.num_kv_heads != layer.num_heads
        ):
            raise ValueError(
                "expected heads of scaled dot products with keys of their own and without positions, got "
                f"{type(attend).__name__}, {layer.num_kv_heads} key-value heads for {layer.num_heads} heads, "
                f"positions {layer.positions or layer.relative}; build CollaborativeAttention afresh"
            )
        weight, has_bias = layer.query.weight, layer.query.bias is not None
        made = cls(
            weight.shape[1],
            layer.num_heads,
            memory_dim=layer.key.in_features,
            bias=has_bias,
            dropout=attend.dropout,
        ).to(weight.device, weight.dtype)
        with torch.no_grad():
            made.shared_query.weight.copy_(weight)
            made.shared_key.weight.copy_(layer.key.weight)
            made.mixing.copy_(torch.eye(layer.num_heads).repeat_interleave(layer.head_dim, 1))
            if made.content_bias is not None:
                keys = layer.key.weight.unflatten(0, (layer.num_heads, -1))
                made.content_bias.copy_(
                    torch.einsum("hdi,hd->hi", keys, layer.query.bias.unflatten(0, (-1, layer.head_dim)))
                )
        made.value.load_state_dict(layer.value.state_dict())
        made.out.load_state_dict(layer.out.state_dict())
        return made.train(layer.training)

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
        """Attends from `x` to itself, or to `memory`; arguments as in `MultiHeadAttention`, `positions` not read."""
        start = 0 if cache is None else cache.length
        query = self.shared_query(x)[:, None] * self.mixing[:, None].to(x.dtype)
        if self.content_bias is not None:  # one more feature, so that no bias has to be a mask
            query = torch.cat([query, query.new_ones(*query.shape[:3], 1)], -1)
        if memory is not None and cache is not None and start:
            key, value = cache.read()
        else:
            key, value = self._project(x if memory is None else memory)
            if cache is not None:
                key, value = cache.append(key, value)
            if is_causal and start:  # torch's is_causal counts from the first key, ours from the last
                mask, is_causal = causal_mask(query.shape[2], key.shape[2], query.device), False
        mixed = self.attend(query, key, value, mask=mask, is_causal=is_causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        key = self.shared_key(memory)[:, None].expand(-1, self.num_heads, -1, -1)
        if self.content_bias is not None:
            key = torch.cat([key, (memory @ self.content_bias.T.to(memory.dtype)).mT[..., None]], -1)
        return key, self.value(memory).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
