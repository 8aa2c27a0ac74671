"""Queries and keys turned by an angle that grows with the position (Su et al. 2021, "RoFormer", arXiv:2104.09864).

The product of a turned query and a turned key depends on their distance only. Differs from the paper in which
components are paired: i with i + head_dim/2, as in the released Llama weights, not 2i with 2i + 1.
"""

import torch
from torch import Tensor, nn

from tameformer.nn.positions.table import table_rows
from tameformer.shapes import Float, Tokens


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], cos: Float[Tensor, "... half"], sin: Float[Tensor, "... half"]
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turns each pair (x_i, x_(i + head_dim/2)) by the angle with the given cosine and sine."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_angles(max_length: int, head_dim: int, base: float = 10_000.0) -> Float[Tensor, "{max_length} half"]:
    """Angle in radians, p / base^(2i/head_dim), of pair i at position p, in float64.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(
            f"expected an even head_dim for rotary positions, got {head_dim}; change dim or num_heads so that "
            "dim / num_heads is even"
        )
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    return torch.arange(max_length, dtype=torch.float64)[:, None] * frequencies


class RotaryPositions(nn.Module):
    """Turns queries or keys; one module can serve all layers. Nothing is learned and nothing is saved.

    The cosines are computed in float64 and cast to the type of `x`, so low precision costs no more than one rounding.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, max_length: int, head_dim: int, *, base: float = 10_000.0):
        super().__init__()
        angles = rotary_angles(max_length, head_dim, base)
        self.register_buffer("cos", angles.cos().to(torch.get_default_dtype()), persistent=False)
        self.register_buffer("sin", angles.sin().to(torch.get_default_dtype()), persistent=False)

    def forward(
        self, x: Float[Tensor, "batch heads seq head_dim"], positions: Tokens | None = None, *, start: int = 0
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """`x` turned by the angles of `positions`; None counts from `start`."""
        cos = table_rows(self.cos, x.shape[2], positions, start).to(x.dtype)
        sin = table_rows(self.sin, x.shape[2], positions, start).to(x.dtype)
        if positions is not None:
            cos, sin = cos[:, None], sin[:, None]
        return rotate(x, cos, sin)
