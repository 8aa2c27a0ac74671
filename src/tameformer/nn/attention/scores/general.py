"""A bilinear score (Luong et al. 2015, "Effective Approaches to Attention-based NMT", arXiv:1508.04025, section 3.1)."""

import torch
from torch import Tensor, nn

from tameformer.nn.attention.scores.dot import DotProducts
from tameformer.shapes import Float


class GeneralScore(nn.Module):
    """Queryᵀ weight key, with a weight for each head; queries and keys may have different widths.

    It is a dot product with turned queries, so that it costs what that costs, fused kernels included, and
    O(query query_dim key_dim) for the turn. `num_heads=1` serves any leading axes.

    Args:
        num_heads: heads, each with its weight.
        query_dim: width of a query.
        key_dim: width of a key; None is `query_dim`.

    Example:
        >>> score = GeneralScore(1, 3, 2)
        >>> score(torch.zeros(5, 3), torch.zeros(4, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, num_heads: int, query_dim: int, key_dim: int | None = None):
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        # Products of inputs of variance 1 start with variance 1, as those of the scaled dot product do.
        self.weight = nn.Parameter(torch.randn(num_heads, query_dim, key_dim) * (query_dim * key_dim) ** -0.5)

    def forward(
        self, query: Float[Tensor, "*batch query query_dim"], key: Float[Tensor, "*batch key key_dim"]
    ) -> Float[Tensor, "*batch query key"]:
        """The logits, all of them in memory."""
        turned, key, _, _ = self.as_dot_product(query, key)
        return turned @ key.transpose(-2, -1)

    def as_dot_product(
        self, query: Float[Tensor, "*batch query query_dim"], key: Float[Tensor, "*batch key key_dim"]
    ) -> DotProducts:
        """The turned queries, and the keys."""
        weight = self.weight[0] if len(self.weight) == 1 else self.weight
        return DotProducts(query @ weight.to(query.dtype), key, scale=1.0)
