"""A penalty on the logarithm of the softmax's denominator, which the cross-entropy leaves free up to a constant.

Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5 (z-loss): the loss of a token gets coefficient * (ln Z)^2, where Z is
the sum of exp(logit) over the vocabulary. Its gradient by a logit is 2 * coefficient * ln Z * probability.
"""

from typing import Literal

import torch
from torch import Tensor

from tameformer.shapes import Float, Integer


def log_partition_penalty(
    logits: Float[Tensor, "*tokens vocab"],
    labels: Integer[Tensor, "*tokens"] | Float[Tensor, "*tokens vocab"] | None = None,
    *,
    coefficient: float = 1e-4,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    weight: Float[Tensor, " vocab"] | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> Float[Tensor, "..."]:
    """The term by which each token's loss grows, reduced as `F.cross_entropy` with the same arguments reduces its own.

    Half-precision logits are raised to float32 before anything is summed: exp(logit) over a vocabulary needs the digits.

    Args:
        logits: The last axis is the vocabulary; use `movedim` for torch's layout with classes in axis 1.
        labels: Token numbers, of which only `ignore_index` matters; or probabilities: every token counts, as with None.
        coefficient: The paper's is 1e-4.
        vocab_size: Columns from this one on are padding, and no part of Z; None is all columns.
        ignore_index: Tokens with this label count nothing.
        weight: Weight of each class: a token counts as in the weighted cross-entropy.
        reduction: "mean" divides by the tokens that count, or by their weights; none that counts gives NaN, as there.

    Example:
        >>> logits = torch.zeros(2, 8)  # ln Z is ln 8
        >>> round(float(log_partition_penalty(logits, coefficient=1.0)), 4), round(2.0794415**2, 4)
        (4.3241, 4.3241)
    """
    real = logits[..., :vocab_size]
    real = real.float() if real.dtype in (torch.float16, torch.bfloat16) else real
    terms = coefficient * torch.logsumexp(real, -1).square()
    counts = None
    if labels is not None and labels.is_floating_point():
        if weight is not None:
            terms = terms * (labels * weight).sum(-1).to(terms.dtype)
    elif labels is not None:
        kept = labels != ignore_index
        counts = kept.to(terms.dtype)
        if weight is not None:
            counts = torch.where(kept, weight[torch.where(kept, labels, 0)], 0).to(terms.dtype)
        terms = terms * counts
    if reduction == "none":
        return terms
    return terms.sum() if reduction == "sum" else terms.sum() / (terms.numel() if counts is None else counts.sum())
