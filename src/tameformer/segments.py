"""Numbers in groups of different sizes: sums, largest ones and softmax within each, as attention along edges needs them.

It stands this low because the attention that computes a softmax and the observation that looks at it import it both.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from tameformer.shapes import Float, Int

Members = Float[Tensor, "members heads"]
Groups = Int[Tensor, " members"]
"""The number of each member's group."""


def segment_sum(values: Members, groups: Groups, count: int) -> Float[Tensor, "groups heads"]:
    """Sum over each of `count` groups; 0 for one without members.

    Example:
        >>> segment_sum(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2, 2]), 3).flatten()
        tensor([1., 0., 5.])
    """
    return values.new_zeros(count, values.shape[1]).scatter_add(0, groups[:, None].expand_as(values), values)


def segment_max(values: Members, groups: Groups, count: int) -> Float[Tensor, "groups heads"]:
    """Largest value of each of `count` groups; -inf for one without members.

    Example:
        >>> segment_max(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 2, 2]), 3).flatten()
        tensor([1., -inf, 3.])
    """
    lowest = values.new_full((count, values.shape[1]), -torch.inf)
    return lowest.scatter_reduce(0, groups[:, None].expand_as(values), values, "amax")


def of_group(values: Float[Tensor, "groups heads"], groups: Groups) -> Members:
    """The value of each member's group."""
    return values.gather(0, groups[:, None].expand(-1, values.shape[1]))


def segment_softmax(logits: Members, groups: Groups, count: int) -> Members:
    """Softmax over the members of each of `count` groups, in float32 or wider.

    Whoever watches a forward pass takes it for attention: the groups are queries, their members the keys that a query sees.
    A softmax of your own over unequal neighbourhoods is seen by the probes when it is computed here.

    Example:
        >>> segment_softmax(torch.zeros(3, 1), torch.tensor([0, 1, 1]), 2).flatten()
        tensor([1.0000, 0.5000, 0.5000])
    """
    if has_torch_function_unary(logits):  # as torch's own functions do, so that a mode sees the call
        return handle_torch_function(segment_softmax, (logits,), logits, groups, count)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest of a group is a constant as far as the softmax goes, so that no gradient has to pass it.
    weights = (logits - of_group(segment_max(logits.detach(), groups, count), groups)).exp()
    return weights / of_group(segment_sum(weights, groups, count), groups)
