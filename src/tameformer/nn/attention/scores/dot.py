"""Dot products, plain (Luong et al. 2015, arXiv:1508.04025, section 3.1) and scaled (Vaswani et al. 2017, equation 1)."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from tameformer.shapes import Float


class DotProducts(NamedTuple):
    """Queries and keys whose dot products are a score, up to what the softmax over keys does not see."""

    query: Float[Tensor, "*batch query width"]
    key: Float[Tensor, "*batch key width"]
    scale: float | None = None
    """Factor on the products; None is 1 / sqrt(width)."""
    bias: Float[Tensor, "*#batch 1 key"] | None = None
    """Added to the scaled products."""


@dataclass(frozen=True)
class DotScore:
    """Query · key · scale; O(query key dim) time, and by the fused kernels O(query + key) memory.

    For entries of mean 0 and variance 1 the product has variance dim, which a scale of 1 / sqrt(dim) takes back to 1:
    without it the softmax of wide heads starts saturated, with hardly a gradient.

    Example:
        >>> import torch
        >>> dot(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[11.,  2.]])
    """

    scale: float | None = None
    """Factor on the products; None is 1 / sqrt(dim)."""

    def __call__(
        self, query: Float[Tensor, "*batch query dim"], key: Float[Tensor, "*batch key dim"]
    ) -> Float[Tensor, "*batch query key"]:
        """The logits, all of them in memory."""
        factor = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        return (query * factor) @ key.transpose(-2, -1)  # scaled first: float16 overflows otherwise

    def as_dot_product(
        self, query: Float[Tensor, "*batch query dim"], key: Float[Tensor, "*batch key dim"]
    ) -> DotProducts:
        """Themselves."""
        return DotProducts(query, key, self.scale)


dot = DotScore(scale=1.0)
"""Query · key."""
scaled_dot = DotScore()
"""Query · key / sqrt(dim)."""
