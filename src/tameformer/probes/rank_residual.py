"""How far the tokens of a sequence are from being all alike: rank collapse.

Dong et al. 2021, "Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially with Depth", arXiv:2103.03404.

Differs from the paper: it measures with sqrt(‖.‖₁ ‖.‖∞), which its proof needs and `composite_rank_residual` computes; the
probe uses the Frobenius norm, which treats all tokens and features alike. Both take out the token mean, as the released code
does, which is not the best rank-one fit but the one that attention converges to.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tameformer.probes.probe import Probe


class RankResidual(Probe):
    """How different the tokens are after each layer; no unit; about 0.1 ms a layer and step.

    `read` gives `diag/rank_residual/<block>`, from 0 (all tokens alike) to 1, and `diag/token_cosine/<block>`, the mean cosine
    of two tokens, near 0 for unrelated ones and 1 where all point the same way: means over the sequences looked at, padding
    included. Sequences of a single token give nothing. Where a layer runs several times in a pass, the first counts.

    Args:
        sequences: How many sequences of a batch are looked at; None is all.
    """

    def __init__(self, *, sequences: int | None = 1) -> None:
        self.sequences = sequences
        self._values: dict[str, Tensor] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._values.clear()

    def on_block(self, block: str, input: Tensor, output: Tensor) -> None:
        """Measure what the layer gave."""
        key = f"diag/rank_residual/{block}"
        if key not in self._values and output.shape[1] > 1:
            x = output[: self.sequences]
            self._values[key] = rank_residual(x).mean().float()
            self._values[f"diag/token_cosine/{block}"] = token_cosine(x).mean().float()

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        return dict(self._values)


def rank_residual(x: Float[Tensor, "*batch seq dim"]) -> Float[Tensor, "*batch"]:
    """‖X - 1 x̄ᵀ‖ / ‖X‖ in the Frobenius norm, where x̄ is the mean token, from 0 to 1; in float32 or wider.

    The difference itself is taken: ‖X‖² - seq ‖x̄‖² needs no copy of X, but cannot tell values below 3e-4 from zero. This one
    ends at about 2e-7, the rounding of float32. 0 for zeros, NaN where an entry is not finite.

    Example:
        >>> rank_residual(torch.tensor([[3.0, 4.0], [3.0, 4.0]])), rank_residual(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]))
        (tensor(0.), tensor(1.))
    """
    x = _at_least_float32(x)
    residual = torch.linalg.vector_norm(x - x.mean(-2, keepdim=True), dim=(-2, -1))
    return residual / torch.linalg.vector_norm(x, dim=(-2, -1)).clamp(min=torch.finfo(x.dtype).tiny)


def token_cosine(x: Float[Tensor, "*batch seq dim"]) -> Float[Tensor, "*batch"]:
    """Mean cosine of two different tokens, from -1 / (seq - 1) to 1; in float32 or wider.

    The tokens' unit vectors u have Σ cos(s, t) = ‖Σ u‖² over all pairs, of which seq are a token with itself; so no seq x seq
    matrix is built. Zero tokens have no direction and do not count; with fewer than two left it is 0. NaN where an entry is
    not finite.

    Example:
        >>> token_cosine(torch.tensor([[1.0, 0.0], [0.0, 2.0]])), token_cosine(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        (tensor(0.), tensor(1.))
    """
    x = _at_least_float32(x)
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    units = x / norms.clamp(min=torch.finfo(x.dtype).tiny)
    count = (norms != 0).sum((-2, -1))
    return (units.sum(-2).square().sum(-1) - count) / (count * (count - 1)).clamp(min=1)


def composite_rank_residual(x: Float[Tensor, "*batch seq dim"]) -> Float[Tensor, "*batch"]:
    """‖X - 1 x̄ᵀ‖ / ‖X‖ where ‖M‖ = sqrt(‖M‖₁ ‖M‖∞), largest column sum times largest row sum of |M|.

    The quantity of the theorem, whose bound without skips and feed-forward layers is cubed with every layer.

    Example:
        >>> composite_rank_residual(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(1.)
    """
    x = _at_least_float32(x)
    residual = _composite_norm(x - x.mean(-2, keepdim=True))
    return residual / _composite_norm(x).clamp(min=torch.finfo(x.dtype).tiny)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _composite_norm(x: Tensor) -> Tensor:
    sizes = x.abs()
    return (sizes.sum(-2).amax(-1) * sizes.sum(-1).amax(-1)).sqrt()
