"""What positions change inside attention by their distance, and the distances themselves: key minus query, in tokens."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from tameformer.shapes import Float, Int, Tokens

Distances = Int[Tensor, "*batch query key"]


class RelativePositions(nn.Module):
    """What all ways share: each gives a bias on the logits, and one also changes the values that are mixed.

    A bias is as large as the logits, so memory grows with query x key, also where a fused kernel does the rest.
    """

    changes_values: ClassVar[bool] = False
    """Whether `values` is to be added to the mixed values; then attention writes its weights out."""

    def scale(self, head_dim: int) -> float | None:
        """Factor on the dot products that goes with the bias; None is 1 / sqrt(head_dim)."""
        return None

    def bias(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        distance: Distances,
    ) -> Float[Tensor, "#batch heads query key"]:
        """What is added to the logits."""
        raise NotImplementedError

    def values(
        self, weights: Float[Tensor, "batch heads query key"], distance: Distances
    ) -> Float[Tensor, "batch heads query head_dim"]:
        """What is added to the mixed values; asked for only where `changes_values`."""
        raise NotImplementedError


def distances(
    query_length: int, key_length: int, positions: Tokens | None = None, device: torch.device | None = None
) -> Distances:
    """Position of the key minus position of the query; the last query stands at the last key.

    Args:
        query_length: how many queries.
        key_length: how many keys; more than queries where earlier ones come from a cache.
        positions: position of each token, where they do not simply count on.
        device: where to.

    Raises:
        ValueError: `positions` do not say where the keys of a cache stand.

    Example:
        >>> distances(2, 3)
        tensor([[-1,  0,  1],
                [-2, -1,  0]])
    """
    if positions is None:
        keys = torch.arange(key_length, device=device)
        return keys - torch.arange(key_length - query_length, key_length, device=device)[:, None]
    if query_length != key_length:
        raise ValueError(
            f"expected as many positions as keys for relative positions, got {query_length} for {key_length} keys; "
            "leave positions out where a cache is used"
        )
    return positions[:, None, :] - positions[:, :, None]


def by_distance(table: Float[Tensor, "heads rows"], index: Int[Tensor, "*batch query key"]) -> Tensor:
    """Column `index` of a table with one row a head: (heads, query, key), or with a batch axis where `index` has one."""
    return table[:, index] if index.dim() == 2 else table[:, index].transpose(0, 1)


def picked(products: Float[Tensor, "batch heads query rows"], index: Int[Tensor, "*batch query key"]) -> Tensor:
    """Entry `index` of each query's row, (batch, heads, query, key)."""
    index = index if index.dim() == 2 else index[:, None]
    return products.gather(-1, index.expand(*products.shape[:3], index.shape[-1]))
