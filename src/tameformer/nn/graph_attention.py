"""Attention along the edges of a graph (Brody et al. 2021, "GATv2", arXiv:2105.14491).

The same as attention with the score of `tameformer.nn.attention.concat_score` and a mask of who is whose neighbour, without
the pairs that are no edges: O(edges) time and memory instead of O(nodes²).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.segments import segment_softmax
from tameformer.shapes import Float, Int

Nodes = Float[Tensor, "nodes features"]
Edges = Int[Tensor, "2 edges"]
"""From the first row to the second."""


class GraphAttention(nn.Module):
    """Every node mixes its neighbours by attention, each head with a score of its own.

    logit of an edge from j to i = vectorᵀ LeakyReLU(target weight x_i + source weight x_j); what is mixed are the vectors
    source weight x_j. A node without edges to it gets the bias; add self-loops for one that shall see itself.

    Args:
        in_dim: width of a node.
        head_dim: width of a head's output.
        num_heads: heads.
        mean: take the mean of the heads instead of putting them side by side.
        dropout: probability of dropping a weight of an edge.
        negative_slope: of the LeakyReLU.
    """

    def __init__(
        self,
        in_dim: int,
        head_dim: int,
        num_heads: int,
        *,
        mean: bool = False,
        dropout: float = 0.0,
        negative_slope: float = 0.2,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.mean = num_heads, head_dim, mean
        self.dropout, self.negative_slope = dropout, negative_slope
        self.source = nn.Linear(in_dim, num_heads * head_dim)
        self.target = nn.Linear(in_dim, num_heads * head_dim)
        self.vector = nn.Parameter(torch.empty(num_heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(head_dim if mean else num_heads * head_dim))
        for weight in (self.source.weight, self.target.weight, self.vector):
            nn.init.xavier_uniform_(weight)
        for linear in (self.source, self.target):
            nn.init.zeros_(linear.bias)

    def weights(self, x: Nodes, edges: Edges) -> Float[Tensor, "edges heads"]:
        """What the nodes that edges come from are mixed with: over the edges to one node they add up to 1."""
        return self._weights(self._split(self.source(x)), self._split(self.target(x)), edges)

    def forward(self, x: Nodes, edges: Edges) -> Float[Tensor, "nodes mixed"]:
        """The mixtures, `head_dim` wide if `mean`, else num_heads * head_dim."""
        source = self._split(self.source(x))
        weights = self._weights(source, self._split(self.target(x)), edges).to(source.dtype)
        messages = source[edges[0]] * F.dropout(weights, self.dropout, self.training)[..., None]
        mixed = torch.zeros_like(source).index_add(0, edges[1], messages)
        return (mixed.mean(1) if self.mean else mixed.flatten(1)) + self.bias

    def _weights(self, source: Tensor, target: Tensor, edges: Tensor) -> Tensor:
        hidden = F.leaky_relu(source[edges[0]] + target[edges[1]], self.negative_slope)
        return segment_softmax((hidden * self.vector).sum(-1), edges[1], len(source))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.num_heads, self.head_dim)

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, mean={self.mean}, dropout={self.dropout}"
