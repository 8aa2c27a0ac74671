"""Sines and cosines of the position, added to the embeddings (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""

import torch
from torch import Tensor, nn

from tameformer.nn.positions.table import table_rows
from tameformer.shapes import Float, Stream, Tokens


def sinusoidal_table(max_length: int, dim: int, base: float = 10_000.0) -> Float[Tensor, "{max_length} {dim}"]:
    """sin(p / base^(2i/dim)) in the even columns 2i and the cosine in the odd ones 2i + 1, for positions p.

    Raises:
        ValueError: `dim` is odd.
    """
    if dim % 2:
        raise ValueError(f"expected an even dim for sinusoidal positions, got {dim}; make dim even")
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(max_length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(torch.get_default_dtype())


class SinusoidalPositions(nn.Module):
    """Adds `sinusoidal_table` to the stream; nothing is learned and nothing is saved."""

    table: Tensor

    def __init__(self, max_length: int, dim: int):
        super().__init__()
        self.register_buffer("table", sinusoidal_table(max_length, dim), persistent=False)

    def forward(self, x: Stream, positions: Tokens | None = None, *, start: int = 0) -> Stream:
        """`x` plus the rows of `positions`; None counts from `start`."""
        return x + table_rows(self.table, x.shape[1], positions, start)
