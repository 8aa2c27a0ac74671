"""Attention masks: bool, True where a query may attend to a key, always four axes `batch heads query key`.

Axes of length 1 broadcast. Masks are combined with `&`. No mask is built where `is_causal=True` says it all.
"""

import torch
from torch import Tensor

from tameformer.shapes import Bool, Int, Real, Tokens


def causal_mask(
    query_length: int, key_length: int, device: torch.device | None = None
) -> Bool[Tensor, "1 1 query key"]:
    """Each query attends to its own position and earlier ones; the last query stands at the last key.

    Example:
        >>> causal_mask(2, 3).int()[0, 0]
        tensor([[1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    mask = torch.ones(query_length, key_length, dtype=torch.bool, device=device)
    return mask.tril(key_length - query_length)[None, None]


def padding_mask(real: Real) -> Bool[Tensor, "batch 1 1 seq"]:
    """Every query attends to the real tokens; `real` is True at real tokens."""
    return real[:, None, None, :]


def document_mask(documents: Tokens) -> Bool[Tensor, "batch 1 seq seq"]:
    """Each position attends to itself and to earlier positions with the same document number.

    Positions of one document must stand together. Padding carries a number of its own, so that no row is empty.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return (same.tril())[:, None]


def real_from_lengths(lengths: Int[Tensor, " batch"], seq: int) -> Bool[Tensor, "batch {seq}"]:
    """True at the first `lengths[i]` of `seq` positions.

    Example:
        >>> real_from_lengths(torch.tensor([1, 3]), 3)
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    return torch.arange(seq, device=lengths.device) < lengths[:, None]


def real_from_tokens(tokens: Tokens, padding_id: int) -> Real:
    """True where the token is not `padding_id`."""
    return tokens != padding_id
