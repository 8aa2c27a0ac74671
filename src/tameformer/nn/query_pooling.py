"""A sequence as one vector, by attention from a learned query.

Yang et al. 2016, "Hierarchical Attention Networks for Document Classification", NAACL, equations 5 to 7.
"""

import torch
from torch import Tensor, nn

from tameformer.nn.attention.attend import attend, attention_weights
from tameformer.nn.attention.scores import dot
from tameformer.shapes import Float, Real, Stream


class QueryPooling(nn.Module):
    """Mean of the vectors, weighted by softmax(query · tanh(key(vector))): what the query asks for is learned.

    Args:
        dim: width of the vectors.
        hidden_dim: width of query and keys; None is `dim`.

    Example:
        >>> QueryPooling(8)(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, dim: int, *, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = dim if hidden_dim is None else hidden_dim
        self.key = nn.Linear(dim, hidden_dim)
        self.query = nn.Parameter(torch.randn(hidden_dim) * hidden_dim**-0.5)

    def forward(self, x: Stream, real: Real | None = None) -> Float[Tensor, "batch dim"]:
        """One vector for each sequence; zeros where none of its tokens is real."""
        query, key, mask = self._parts(x, real)
        return attend(query, key, x[:, None], score=dot, mask=mask)[:, 0, 0]

    def weights(self, x: Stream, real: Real | None = None) -> Float[Tensor, "batch seq"]:
        """How much of each vector is in the result."""
        query, key, mask = self._parts(x, real)
        return attention_weights(query, key, score=dot, mask=mask)[:, 0, 0]

    def _parts(self, x, real):
        key = torch.tanh(self.key(x))[:, None]
        query = self.query.to(key.dtype).expand(len(x), 1, 1, -1)
        return query, key, None if real is None else real[:, None, None]
