"""A score by a small network (Bahdanau et al. 2014, "Jointly Learning to Align and Translate", arXiv:1409.0473, A.1.2)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tameformer.shapes import Float


class AdditiveScore(nn.Module):
    """Vectorᵀ activation(query_weightᵀ query + key_weightᵀ key), with weights for each head.

    Not for long sequences: no fused kernel does it, and every pair of query and key has a hidden vector in memory, kept for
    the backward pass: O(query key hidden_dim) time and memory for each head, hidden_dim times those of dot products.
    `num_heads=1` serves any leading axes.

    Args:
        num_heads: heads, each with its weights.
        query_dim: width of a query.
        key_dim: width of a key; None is `query_dim`.
        hidden_dim: width of the hidden vectors; None is `query_dim`.
        activation: what stands between the two layers.

    Example:
        >>> AdditiveScore(1, 3, 2, hidden_dim=8)(torch.zeros(5, 3), torch.zeros(4, 2))[0]
        tensor([0., 0., 0., 0.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        num_heads: int,
        query_dim: int,
        key_dim: int | None = None,
        *,
        hidden_dim: int | None = None,
        activation: Callable[[Tensor], Tensor] = torch.tanh,
    ):
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        hidden_dim = query_dim if hidden_dim is None else hidden_dim
        joint = (query_dim + key_dim) ** -0.5  # one layer over both, cut in two
        self.query_weight = nn.Parameter(torch.randn(num_heads, query_dim, hidden_dim) * joint)
        self.key_weight = nn.Parameter(torch.randn(num_heads, key_dim, hidden_dim) * joint)
        self.vector = nn.Parameter(torch.randn(num_heads, hidden_dim) * hidden_dim**-0.5)
        self.activation = activation

    def forward(
        self, query: Float[Tensor, "*batch query query_dim"], key: Float[Tensor, "*batch key key_dim"]
    ) -> Float[Tensor, "*batch query key"]:
        """The logits."""
        query_weight, key_weight, vector = self.query_weight, self.key_weight, self.vector[:, None, :, None]
        if len(vector) == 1:  # no axis of heads, so that inputs need none
            query_weight, key_weight, vector = query_weight[0], key_weight[0], vector[0, 0]
        queries, keys = query @ query_weight.to(query.dtype), key @ key_weight.to(key.dtype)
        hidden = self.activation(queries.unsqueeze(-2) + keys.unsqueeze(-3))
        return (hidden @ vector.to(hidden.dtype)).squeeze(-1)
