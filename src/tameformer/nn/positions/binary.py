"""The position as a binary number, added to the embeddings: what sines and cosines are the continuous form of."""

import torch
from torch import Tensor, nn

from tameformer.nn.positions.table import table_rows
from tameformer.shapes import Float, Stream, Tokens


def binary_table(max_length: int, dim: int) -> Float[Tensor, "{max_length} {dim}"]:
    """Bit i of the position in column i, 0 or 1, the lowest bit first; columns without a bit are 0.

    Raises:
        ValueError: `dim` has fewer columns than positions have bits.

    Example:
        >>> binary_table(6, 4)[[1, 5], :]
        tensor([[1., 0., 0., 0.],
                [1., 0., 1., 0.]])
    """
    bits = (max_length - 1).bit_length()
    if bits > dim:
        raise ValueError(f"expected dim of at least {bits} for {max_length} binary positions, got {dim}")
    numbers = torch.arange(max_length)[:, None] >> torch.arange(dim).clamp(max=62)
    return (numbers % 2).to(torch.get_default_dtype())


class BinaryPositions(nn.Module):
    """Adds `binary_table` to the stream; nothing is learned and nothing is saved."""

    table: Tensor

    def __init__(self, max_length: int, dim: int):
        super().__init__()
        self.register_buffer("table", binary_table(max_length, dim), persistent=False)

    def forward(self, x: Stream, positions: Tokens | None = None, *, start: int = 0) -> Stream:
        """`x` plus the rows of `positions`; None counts from `start`."""
        return x + table_rows(self.table, x.shape[1], positions, start)
