"""A penalty that grows with the distance (Press et al. 2021, "Train Short, Test Long", ALiBi, arXiv:2108.12409).

Differs from the paper: without a causal mask both directions are penalized alike. Nothing is learned.
"""

import math

import torch
from torch import Tensor

from tameformer.nn.positions.relative import Distances, RelativePositions
from tameformer.shapes import Float


def alibi_slopes(num_heads: int) -> Float[Tensor, " heads"]:
    """Penalty for each token of distance: 2^(-8 i / heads) for heads i = 1, 2, ...; float64.

    Where `num_heads` is no power of two, those of the power below come first and every other one of the power above after
    them, as in the released code.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2 ** (-4 * i / power) for i in range(1, 2 * power + 1, 2)][: num_heads - power]
    return torch.tensor(slopes, dtype=torch.float64)


class AlibiPositions(RelativePositions):
    """-slope · |distance| on the logits of a head; nothing is learned and nothing is saved."""

    slopes: Tensor

    def __init__(self, num_heads: int):
        super().__init__()
        self.register_buffer("slopes", alibi_slopes(num_heads).to(torch.get_default_dtype()), persistent=False)

    def bias(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        distance: Distances,
    ) -> Float[Tensor, "#batch heads query key"]:
        """The penalties."""
        distance = distance[None] if distance.dim() == 2 else distance
        return -self.slopes.to(query.dtype)[:, None, None] * distance.abs()[:, None]
