"""The largest attention logit of each head, exactly, without the matrix of all logits."""

import torch
from torch import Tensor

from tameformer.shapes import Float

BLOCK_ELEMENTS = 1 << 22
"""How many logits are in memory at once, if a single query of each head has no more."""


def largest_logits(
    query: Float[Tensor, "*batch heads query head_dim"],
    key: Float[Tensor, "*batch kv_heads key head_dim"],
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, " heads"]:
    """Per head the largest scaled dot product of a query and a key that it may attend to, over the batch; no gradient.

    Computed a block of queries at a time, in float32 or wider from products that are rounded as the type of `query` is, or
    autocast's. -inf for a head without such a pair; NaN where a pair has NaN.

    Args:
        query: Of all heads.
        key: Each of `kv_heads` serves `heads / kv_heads` neighbouring heads of the queries.
        mask: True where a query may attend to a key, or floats that will be added to the logits: -inf, or the smallest
            numbers of their type, forbid, and any other leaves the dot product as it is.
        is_causal: Query i sees the keys 0..i.
        scale: Factor on the dot products; None is 1/sqrt(head_dim).

    Example:
        >>> largest_logits(torch.ones(1, 3, 2), torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), is_causal=True, scale=1.0)
        tensor([18.])
        >>> largest_logits(torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0], [9.0, 9.0]]]), is_causal=True, scale=1.0)
        tensor([1.])
    """
    query, key = query.detach().reshape(-1, *query.shape[-3:]), key.detach().reshape(-1, *key.shape[-3:])
    (batch, heads, queries, head_dim), (_, kv_heads, keys, _) = query.shape, key.shape
    factor = head_dim**-0.5 if scale is None else scale
    if not query.numel() or not key.numel():
        return query.new_full((heads,), -torch.inf)
    rows = max(1, BLOCK_ELEMENTS // max(1, batch * heads * keys))
    found = []
    for start in range(0, queries, rows):
        stop = min(start + rows, queries)
        seen = min(stop, keys) if is_causal else keys
        # The heads that share a key make one product with it.
        block = (query[:, :, start:stop] * factor).reshape(batch, kv_heads, -1, head_dim)
        logits = (block @ key[:, :, :seen].transpose(-2, -1)).view(batch, heads, stop - start, seen)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if is_causal:
            future = torch.ones(stop - start, seen, dtype=torch.bool, device=logits.device).triu(start + 1)
            logits = logits.masked_fill(future, -torch.inf)
        if mask is not None:
            of_block = mask[..., start:stop, :seen] if mask.shape[-2] > 1 else mask[..., :seen]
            forbidden = ~of_block if mask.dtype == torch.bool else of_block <= torch.finfo(mask.dtype).min / 2
            logits = logits.masked_fill(forbidden.reshape(-1, *forbidden.shape[-3:]), -torch.inf)
        found.append(logits.amax((0, 2, 3)))
    return torch.stack(found).amax(0)
