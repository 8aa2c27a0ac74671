"""The layer applied to each position alone, plain and gated.

Vaswani et al. 2017, arXiv:1706.03762, section 3.3; Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.shapes import Stream


class FeedForward(nn.Module):
    """down(activation(up(x)))."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Stream) -> Stream:
        """Applies the layer; `dropout` acts on the hidden units while training."""
        return self.down(F.dropout(self.activation(self.up(x)), self.dropout, self.training))


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)); with SiLU this is SwiGLU."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=bias)
        self.up = nn.Linear(dim, hidden_dim, bias=bias)
        self.down = nn.Linear(hidden_dim, dim, bias=bias)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Stream) -> Stream:
        """Applies the layer; `dropout` acts on the hidden units while training."""
        return self.down(F.dropout(self.activation(self.gate(x)) * self.up(x), self.dropout, self.training))


def plain_hidden_dim(dim: int) -> int:
    """The usual width of the two-layer kind, 4 dim."""
    return 4 * dim


def gated_hidden_dim(dim: int) -> int:
    """8/3 dim, which gives the gated kind as many weights, rounded up to a multiple of 64.

    Example:
        >>> gated_hidden_dim(128)
        384
    """
    return -(-8 * dim // (3 * 64)) * 64
