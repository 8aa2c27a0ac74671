"""Stochastic depth: a branch is dropped for whole examples (Huang et al. 2016, arXiv:1603.09382)."""

import torch
from torch import nn

from tameformer.shapes import Stream


def drop_path(x: Stream, rate: float, *, generator: torch.Generator | None = None) -> Stream:
    """`x` with each example zeroed with probability `rate`, the others divided by 1 - rate; 0 <= rate < 1."""
    keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - rate, generator=generator)
    return x * (keep / (1 - rate))


class DropPath(nn.Module):
    """`drop_path` while training, nothing otherwise.

    Raises:
        ValueError: `rate` is outside [0, 1).
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"expected 0 <= rate < 1, got {rate}; a rate of 1 would drop every branch")
        self.rate = rate

    def forward(self, x: Stream) -> Stream:
        """Drops examples at random while training."""
        return drop_path(x, self.rate) if self.training and self.rate else x

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        return f"rate={self.rate}"


def depth_rates(rate: float, num_layers: int) -> list[float]:
    """Rates that grow linearly from 0 at the first layer to `rate` at the last; one layer alone gets 0.

    Example:
        >>> depth_rates(0.2, 3)
        [0.0, 0.1, 0.2]
    """
    return [rate * layer / max(1, num_layers - 1) for layer in range(num_layers)]
