"""Entropy of attention along edges, where every query sees a neighbourhood of its own: exact, over all queries.

The weights are in memory anyway, and sums over edges are as cheap as the softmax was, so that no rows are chosen.
"""

import torch
from torch import Tensor

from tameformer.nn.attention.entropy_bounds import entropy_lower_bound
from tameformer.segments import of_group, segment_max, segment_sum
from tameformer.shapes import Float, Int


def edge_entropy(
    logits: Float[Tensor, "edges heads"], groups: Int[Tensor, " edges"], num_queries: int
) -> Float[Tensor, "queries heads"]:
    """Shannon entropy of each query's distribution over its edges, in nats, in float32; NaN for a query without edges.

    Example:
        >>> edge_entropy(torch.zeros(5, 1), torch.tensor([0, 1, 1, 1, 1]), 2).exp().flatten()
        tensor([1., 4.])
    """
    logits = logits.float()
    # With the largest of a group taken off, log Z - sum(e^s s) / Z has no negative terms.
    shifted = logits - of_group(segment_max(logits, groups, num_queries), groups)
    weights = shifted.exp()
    total = segment_sum(weights, groups, num_queries)
    entropy = total.log() - segment_sum(shifted * weights, groups, num_queries) / total
    return torch.where(total > 0, entropy, torch.nan)


def edge_statistics(
    logits: Float[Tensor, "edges heads"], groups: Int[Tensor, " edges"], num_queries: int
) -> dict[str, Tensor]:
    """What `AttentionEntropy` measures, by its name, (heads,) each, the ceiling a number; queries without edges do not count.

    Example:
        >>> edge_statistics(torch.zeros(5, 1), torch.tensor([0, 1, 1, 1, 1]), 2)["attention_entropy"]
        tensor([0.6931])
    """
    logits = logits.float()
    sizes = segment_sum(torch.ones_like(logits[:, :1]), groups, num_queries)
    has_edges = sizes > 0
    count = has_edges.sum()
    entropy = edge_entropy(logits, groups, num_queries)
    centred = logits - of_group(segment_sum(logits, groups, num_queries) / sizes, groups)
    norm = segment_sum(centred.square(), groups, num_queries).sqrt()
    bound = entropy_lower_bound(norm, sizes.long().clamp(min=1))

    def mean(values: Tensor) -> Tensor:
        return torch.where(has_edges, values, 0.0).sum(0) / count

    average, smallest = mean(entropy), torch.where(has_edges, entropy, torch.inf).amin(0)
    nan = torch.where(count > 0, 0.0, torch.nan)
    return {
        "attention_entropy": average,
        "attention_entropy_error": torch.where(average.isnan(), average, 0.0),  # all queries were looked at
        "attention_entropy_min": smallest + nan,
        "attention_entropy_bound": mean(bound),
        "attention_logit_max": segment_max(logits, groups, num_queries).amax(0) + nan,
        "attention_entropy_max": mean(sizes.clamp(min=1).log())[0],
    }
