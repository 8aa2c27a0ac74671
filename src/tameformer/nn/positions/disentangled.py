"""Content and distance scored apart (He et al. 2020, "DeBERTa", arXiv:2006.03654, equation 4).

Logits are (content · content + query · key vector of the distance + key · query vector of the distance) / sqrt(3 head_dim).
Differs from the paper: the projected vectors are learned in each layer rather than projected from one table that all layers
share, and the query vector is that of the same distance, as in the released code, not of its mirror image.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tameformer.nn.positions.relative import Distances, RelativePositions, picked
from tameformer.shapes import Float


def log_buckets(behind: Distances, *, num_buckets: int = 256, max_distance: int = 512) -> Distances:
    """Distances with the far ones on a logarithmic scale, as DeBERTa has them from version 2 on.

    Up to num_buckets / 2 a distance stays what it is; `max_distance - 1` becomes num_buckets - 1. The sign is kept.

    Example:
        >>> log_buckets(torch.tensor([[-511, -3, 0, 128, 200]])).tolist()
        [[-255, -3, 0, 128, 169]]
    """
    middle = num_buckets // 2
    length = behind.abs().clamp(min=middle - 1)
    growth = torch.log(length / middle) / torch.log(torch.tensor((max_distance - 1) / middle)) * (middle - 1)
    far = (growth.ceil() + middle).to(torch.long) * behind.sign()
    return torch.where(behind.abs() <= middle, behind, far)


class DisentangledPositions(RelativePositions):
    """DeBERTa's two biases, content to position and position to content, and its scale.

    No fused kernel computes the biases: two arrays as large as the logits are in memory for the backward pass.

    Args:
        num_heads: heads of the queries.
        head_dim: width of a head.
        max_distance: distances are cut to -max_distance..max_distance - 1, counted from the key to the query.
        buckets: applied to the distances first, such as `log_buckets`; None leaves them as they are.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        max_distance: int = 512,
        buckets: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__()
        self.max_distance, self.buckets = max_distance, buckets
        self.keys = nn.Parameter(torch.empty(num_heads, 2 * max_distance, head_dim))
        self.queries = nn.Parameter(torch.empty(num_heads, 2 * max_distance, head_dim))
        for table in (self.keys, self.queries):
            nn.init.normal_(table, std=0.02)

    def scale(self, head_dim: int) -> float | None:
        """1 / sqrt(3 head_dim): the logits are a sum of three products."""
        return 1 / math.sqrt(3 * head_dim)

    def bias(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        distance: Distances,
    ) -> Float[Tensor, "#batch heads query key"]:
        """Both biases, scaled."""
        behind = -distance if self.buckets is None else self.buckets(-distance)
        rows = behind.clamp(-self.max_distance, self.max_distance - 1) + self.max_distance
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        to_position = picked(query @ self.keys.to(query.dtype).mT, rows)
        to_content = picked(key @ self.queries.to(key.dtype).mT, rows.mT).mT
        return (to_position + to_content) / math.sqrt(3 * query.shape[-1])
