"""Learned vectors for distances, added to keys and to values (Shaw et al. 2018, arXiv:1803.02155, equations 3 and 4)."""

import torch
from torch import Tensor, nn

from tameformer.nn.positions.relative import Distances, RelativePositions, picked
from tameformer.shapes import Float


class ShawPositions(RelativePositions):
    """Keys and values each plus a vector for the distance, cut to -max_distance..max_distance and shared by all heads.

    The key's part is a bias, query · vector, from one product with the vectors of all distances, so no vector for each pair
    is in memory. The value's part needs the weights: attention writes them out, and no fused kernel runs. What probes see of
    each head's output is without the value's part.

    Args:
        head_dim: width of a head.
        max_distance: largest distance told apart, in tokens.
    """

    changes_values = True

    def __init__(self, head_dim: int, *, max_distance: int = 16):
        super().__init__()
        if max_distance < 1:
            raise ValueError(f"expected max_distance of at least 1, got {max_distance}")
        self.max_distance = max_distance
        self.keys = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
        self.mixed = nn.Parameter(torch.empty(2 * max_distance + 1, head_dim))
        for table in (self.keys, self.mixed):
            nn.init.normal_(table, std=0.02)

    def bias(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        distance: Distances,
    ) -> Float[Tensor, "#batch heads query key"]:
        """Query · vector of the distance / sqrt(head_dim)."""
        products = query @ self.keys.to(query.dtype).T * query.shape[-1] ** -0.5
        return picked(products, self._rows(distance))

    def values(
        self, weights: Float[Tensor, "batch heads query key"], distance: Distances
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """The vectors of the distances, mixed by the weights."""
        rows = self._rows(distance)
        rows = (rows if rows.dim() == 2 else rows[:, None]).expand_as(weights)
        by_row = weights.new_zeros(*weights.shape[:-1], len(self.mixed)).scatter_add(-1, rows, weights)
        return by_row @ self.mixed.to(weights.dtype)

    def _rows(self, distance: Tensor) -> Tensor:
        return distance.clamp(-self.max_distance, self.max_distance) + self.max_distance
