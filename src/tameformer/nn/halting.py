"""Adaptive computation time: each position decides after how many steps it has had enough (Graves 2016, arXiv:1603.08983)."""

import torch
from torch import Tensor, nn

from tameformer.shapes import Bool, Float, Real, Stream


class Halting(nn.Module):
    """How much of the result each step of each position is, and which positions go on.

    After each step a position halts with probability sigmoid(weight · state + bias). The probabilities of a position's steps
    are summed until they pass `threshold`, or the last step; that step gets what is missing to 1. The result is the mean of
    the states weighted by these shares, and its cost is the number of steps plus the last share, which has a gradient.

    Attributes:
        threshold: sum of probabilities at which a position halts; below 1, so that one step can be enough.

    Example:
        >>> halting = Halting(4)
        >>> state, done = torch.zeros(1, 3, 4), halting.begin(torch.zeros(1, 3, 4))
        >>> for step in range(6):
        ...     share = halting.share(state, done, is_last=step == 5)
        >>> done.steps[0].tolist()
        [2.0, 2.0, 2.0]
    """

    def __init__(self, dim: int, *, threshold: float = 0.99):
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"expected a threshold between 0 and 1, got {threshold}")
        self.threshold = threshold
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.ones(1))  # halts early at first, as in the released code

    def begin(self, x: Stream) -> "Halted":
        """Nothing has been spent."""
        nothing = x.new_zeros(x.shape[:2])
        return Halted(spent=nothing, steps=nothing, rest=nothing)

    def share(self, x: Stream, done: "Halted", *, is_last: bool) -> Float[Tensor, "batch seq"]:
        """What share of the result these states are; 0 for positions that have halted. Brings `done` up to date."""
        running = done.running
        probability = torch.sigmoid(x @ self.weight.to(x.dtype) + self.bias.to(x.dtype)) * running
        ends = running & ((done.spent + probability > self.threshold) | is_last)
        share = torch.where(ends, 1 - done.spent, probability)
        done.rest = torch.where(ends, share, done.rest)
        done.steps = done.steps + running
        done.spent = torch.where(ends, torch.ones_like(done.spent), done.spent + probability)
        return share


class Halted:
    """What positions have spent so far, all (batch, seq): probability, steps, and the share of their last step."""

    def __init__(self, *, spent: Tensor, steps: Tensor, rest: Tensor):
        self.spent, self.steps, self.rest = spent, steps, rest

    @property
    def running(self) -> Bool[Tensor, "batch seq"]:
        """Who has not halted."""
        return self.spent < 1

    def cost(self, real: Real | None = None) -> Float[Tensor, ""]:
        """Mean over real positions of steps + share of the last step: to be added to the loss, times a small factor."""
        cost = self.steps + self.rest
        # Chosen by `where`, not by selection, whose size an accelerator would have to tell.
        return cost.mean() if real is None else torch.where(real, cost, 0.0).sum() / real.sum()
