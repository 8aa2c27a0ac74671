"""The loss of learning by comparison (Chen et al. 2020, "SimCLR", arXiv:2002.05709, equation 1; "NT-Xent").

Each view must find the other view of its image among the views of all images, those of all processes included: these are
gathered with their gradients, so that several processes compute what one would.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tameformer.shapes import Float

Gather = Callable[[Tensor], Tensor]
"""From this process's rows to the rows of all processes, those of one rank after the other; gradients flow back."""


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    *,
    temperature: float = 0.5,
    gather: Gather | None = None,
    rank: int = 0,
) -> Float[Tensor, ""]:
    """Cross-entropy of finding the other view by cosine similarity, mean over both views, summed over the images.

    Args:
        first: one view of each image; only the direction counts.
        second: the other view of each.
        temperature: divides the similarities, above 0.
        gather: brings the rows of other processes; None compares these images among themselves.
        rank: place of this process's rows among the gathered ones.

    Example:
        >>> views = torch.eye(3)
        >>> round(nt_xent(views, views, temperature=0.1).item(), 4)  # one right answer, four orthogonal ones, each of 3
        0.0005
    """
    # In float32 at least: exp(1 / temperature) is beyond half precision's digits.
    wide = torch.promote_types(first.dtype, torch.float32)
    first, second = F.normalize(first.to(wide), dim=-1), F.normalize(second.to(wide), dim=-1)
    all_first, all_second = (first, second) if gather is None else (gather(first), gather(second))
    own = torch.arange(len(first), device=first.device) + rank * len(first)
    keys = torch.cat([all_first, all_second])
    total = first.new_zeros(())
    for queries, offset, other in ((first, 0, len(all_first)), (second, len(all_first), 0)):
        logits = queries @ keys.T / temperature
        logits = logits.scatter(1, (own + offset)[:, None], -torch.inf)  # a view is no candidate for itself
        total = total + F.cross_entropy(logits, own + other, reduction="sum")
    return total / 2


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes in the order of ranks, with gradients; alone, the rows themselves.

    All processes must have equally many.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(list(all_gather(rows.contiguous())))
