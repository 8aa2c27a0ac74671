"""What is known about attention before it is measured: bounds on a row's entropy and on its largest logit.

The entropy bound is theorem 3.1 of Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy
Collapse", arXiv:2303.06296. The paper states it for the product of spectral norms; its proof uses only the L2 norm of
a row of logits, so `centred_logit_norm` in the place of that product gives a bound that is tight enough to read.
"""

import math

import torch
from torch import Tensor

from tameformer.shapes import Bool, Float, Int
from tameformer.tensors import widest


def entropy_lower_bound(
    spectral_norm: Float[Tensor, "*#rows"] | float, num_keys: Int[Tensor, "*#rows"] | int
) -> Float[Tensor, "*rows"]:
    """The least entropy, in nats, that a row of `num_keys` logits with L2 norm at most `spectral_norm` can have.

    With a = spectral_norm sqrt(n / (n - 1)) and u = ln(n - 1) - a it is ln(1 + e^u) + a sigmoid(u): ln n at norm 0, then
    falling, and about n a e^-a for large norms. The row with one entry at spectral_norm sqrt((n - 1) / n) and
    all others equal, with mean 0, attains it.

    Args:
        spectral_norm: A bound on the L2 norm of the row of logits, the scale of the attention included: a product of
            spectral norms as in the paper, or the tight `centred_logit_norm`. Infinity gives 0, NaN and negative
            values give NaN.
        num_keys: How many keys the row can see; 1 gives 0, less than 1 gives NaN.

    Returns:
        The bound in the type of `spectral_norm`, float64 for a number; computed in float64 where the device has it.

    References:
        Zhai et al. 2023, arXiv:2303.06296, theorem 3.1.

    Example:
        >>> entropy_lower_bound(torch.tensor([0.0, 5.0, 10.0, 1e6]), 197)
        tensor([5.2832, 3.6716, 0.0949, 0.0000])
    """
    norm = torch.as_tensor(spectral_norm, dtype=None if isinstance(spectral_norm, Tensor) else torch.float64)
    wide, dtype = widest(norm.device), norm.dtype
    norm, keys = norm.to(wide), torch.as_tensor(num_keys, dtype=wide, device=norm.device)
    reach = norm * (keys / (keys - 1)).sqrt()
    margin = (keys - 1).log() - reach
    bound = torch.logaddexp(margin, torch.zeros_like(margin)) + reach * margin.sigmoid()
    bound = torch.where((keys == 1) | norm.isposinf(), 0.0, bound)
    return torch.where((keys >= 1) & (norm >= 0), bound, math.nan).to(dtype)


def centred_logit_norm(
    logits: Float[Tensor, "*rows key"], visible: Bool[Tensor, "*#rows key"] | None = None
) -> Float[Tensor, "*rows"]:
    """L2 norm of a row of logits less their mean, over the visible keys; NaN where no key is visible.

    Softmax does not see the mean, so this is the smallest norm that `entropy_lower_bound` may be given.

    Args:
        logits: Attention scores after scaling, before softmax; computed in float32 or wider.
        visible: True where the query may attend; None is everywhere.

    Example:
        >>> centred_logit_norm(torch.tensor([[7.0, 1.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor([4.2426])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if visible is None:
        return torch.linalg.vector_norm(logits - logits.mean(-1, keepdim=True), dim=-1)
    mean = logits.where(visible, 0.0).sum(-1, keepdim=True) / visible.sum(-1, keepdim=True)
    # A row without a visible key has the mean 0 / 0, which marks it.
    return torch.linalg.vector_norm((logits - mean).where(visible, 0.0), dim=-1) + 0.0 * mean.squeeze(-1)


def max_logit_bracket(
    logsumexp: Float[Tensor, "*#rows"], visible_keys: Int[Tensor, "*#rows"] | int
) -> tuple[Float[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """Between which values the largest logit of each row lies: (logsumexp - ln visible_keys, logsumexp).

    A kernel that returns the log-sum-exp thereby tells, without another pass, whether the logits grow. Both ends are NaN
    where no key is visible, and where `logsumexp` is NaN.

    Args:
        logsumexp: ln of the sum of e^logit over the visible keys.
        visible_keys: How many keys each row sees.

    Example:
        >>> max_logit_bracket(torch.tensor([3.0, 1.0, 7.0]).logsumexp(0), 3)
        (tensor(5.9220), tensor(7.0206))
    """
    keys = torch.as_tensor(visible_keys, device=logsumexp.device)
    high = torch.where(keys > 0, logsumexp, math.nan)
    return high - keys.to(logsumexp.dtype).log(), high
