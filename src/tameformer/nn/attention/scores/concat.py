"""The score of graph attention that looks at both sides (Brody et al. 2021, "GATv2", arXiv:2105.14491, equation 7)."""

from functools import partial

import torch.nn.functional as F

from tameformer.nn.attention.scores.additive import AdditiveScore


def concat_score(
    num_heads: int,
    query_dim: int,
    key_dim: int | None = None,
    *,
    hidden_dim: int | None = None,
    negative_slope: float = 0.2,
) -> AdditiveScore:
    """vectorᵀ LeakyReLU(weight [query; key]): Bahdanau's score with a LeakyReLU, so at its cost.

    The product of a weight with a concatenation is the sum of two products, which is how it is computed. Differs from the
    first GAT, where the LeakyReLU stands behind the vector: there the order of the keys is the same for all queries.

    Example:
        >>> import torch
        >>> concat_score(4, 8)(torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 3, 8)).shape
        torch.Size([2, 4, 5, 3])
    """
    activation = partial(F.leaky_relu, negative_slope=negative_slope)
    return AdditiveScore(num_heads, query_dim, key_dim, hidden_dim=hidden_dim, activation=activation)
