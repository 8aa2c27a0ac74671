"""One learned vector a position, added to the embeddings (Gehring et al. 2017, arXiv:1705.03122, section 3.1)."""

import torch
from torch import nn

from tameformer.nn.positions.table import table_rows
from tameformer.shapes import Stream, Tokens


class LearnedPositions(nn.Module):
    """Adds row p of a learned table to the stream at position p; the table starts as normal noise of deviation 0.02."""

    def __init__(self, max_length: int, dim: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_length, dim))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, x: Stream, positions: Tokens | None = None, *, start: int = 0) -> Stream:
        """`x` plus the rows of `positions`; None counts from `start`."""
        return x + table_rows(self.table, x.shape[1], positions, start)
