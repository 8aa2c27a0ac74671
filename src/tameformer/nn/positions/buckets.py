"""One learned number on the logits for a head and a range of distances (Raffel et al. 2019, "T5", arXiv:1910.10683).

Differs from the paper: each layer has numbers of its own, where T5 shares those of its first layer.
"""

import math

import torch
from torch import Tensor, nn

from tameformer.nn.positions.relative import Distances, RelativePositions, by_distance
from tameformer.shapes import Float


def t5_buckets(distance: Distances, *, num_buckets: int = 32, max_distance: int = 128) -> Distances:
    """Number of the range that a distance falls into, in both directions.

    Half of the buckets are for keys behind the query. Of each half, half are for one distance each, and the rest grow with
    the logarithm up to `max_distance`; all larger distances share the last.

    Example:
        >>> t5_buckets(torch.tensor([[-200, -8, -1, 0, 1, 20]])).tolist()
        [[15, 8, 1, 0, 17, 26]]
    """
    half = num_buckets // 2
    exact, length = half // 2, distance.abs()
    # As in the release in float32: the borders between buckets depend on its rounding.
    growth = torch.log(length.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).to(torch.long)).clamp(max=half - 1)
    return torch.where(length < exact, length, far) + half * (distance > 0)


class BucketedPositions(RelativePositions):
    """T5's bias; the numbers start as normal noise of deviation 0.02.

    Args:
        num_heads: heads of the queries.
        num_buckets: ranges of distances, those of both directions; a multiple of 4.
        max_distance: in tokens; larger ones are not told apart.

    Raises:
        ValueError: `num_buckets` is no multiple of 4.
    """

    def __init__(self, num_heads: int, *, num_buckets: int = 32, max_distance: int = 128):
        super().__init__()
        if num_buckets < 4 or num_buckets % 4:
            raise ValueError(f"expected num_buckets to be a multiple of 4, got {num_buckets}")
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.table = nn.Parameter(torch.empty(num_heads, num_buckets))
        nn.init.normal_(self.table, std=0.02)

    def bias(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        distance: Distances,
    ) -> Float[Tensor, "#batch heads query key"]:
        """Each pair's number."""
        index = t5_buckets(distance, num_buckets=self.num_buckets, max_distance=self.max_distance)
        bias = by_distance(self.table.to(query.dtype), index)
        return bias[None] if bias.dim() == 3 else bias
