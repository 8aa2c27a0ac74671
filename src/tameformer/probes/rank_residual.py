"""How far the tokens of a sequence are from being all alike: rank collapse.

Dong et al. 2021, "Attention is Not All You Need: Pure Attention Loses Rank Doubly Exponentially with Depth", arXiv:2103.03404.

Differs from the paper: it measures with sqrt(‖.‖₁ ‖.‖∞), which its proof needs and `composite_rank_residual` computes; the
probe uses the Frobenius norm, which treats all tokens and features alike. Both take out the token mean, as the released code
does, which is not the best rank-one fit but the one that attention converges to.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tameformer.probes.dead_units import stacked
from tameformer.probes.probe import Probe
from tameformer.shapes import Float


class RankResidual(Probe):
    """How different the tokens are after each layer; no unit; about 0.1 ms a layer and step.

    `read` gives `diag/rank_residual/<block>`, from 0 (all tokens alike) to 1, and `diag/token_cosine/<block>`, the mean cosine
    of two tokens, near 0 for unrelated ones and 1 where all point the same way: means over the sequences looked at, padding
    included. Sequences of a single token give nothing. Where a layer runs several times in a pass, the first counts.

    Args:
        sequences: How many sequences of a batch are looked at; None is all.
        tokens: How many tokens of each, evenly spread; None is all.
    """

    def __init__(self, *, sequences: int | None = 1, tokens: int | None = 128) -> None:
        self.sequences, self.tokens = sequences, tokens
        self._parts: dict[str, Sequence[Tensor]] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._parts.clear()

    def on_block(self, block: str, input: Tensor, output: Tensor) -> None:
        """Measure what the layer gave."""
        if block not in self._parts and output.shape[1] > 1:
            spacing = 1 if self.tokens is None else -(-output.shape[1] // self.tokens)
            x = _at_least_float32(output[: self.sequences, ::spacing])
            norms = _token_norms(x)
            self._parts[block] = norms.squeeze(-1), _residual_norm(x), _squared_unit_sum(x, norms)

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        values = {}
        for blocks, (norms, residual_norm, unit_sum) in stacked(self._parts):
            residuals = _residual_ratio(residual_norm, norms).float().mean(-1)
            cosines = _mean_cosine(unit_sum, norms).float().mean(-1)
            for block, residual, cosine in zip(blocks, residuals, cosines, strict=True):
                values |= {f"diag/rank_residual/{block}": residual, f"diag/token_cosine/{block}": cosine}
        return values


def rank_residual(x: Float[Tensor, "*batch seq dim"]) -> Float[Tensor, "*batch"]:
    """‖X - 1 x̄ᵀ‖ / ‖X‖ in the Frobenius norm, where x̄ is the mean token, from 0 to 1; in float32 or wider.

    The difference itself is taken: ‖X‖² - seq ‖x̄‖² needs no copy of X, but cannot tell values below 3e-4 from zero. This one
    ends at about 2e-7, the rounding of float32. 0 for zeros, NaN where an entry is not finite.

    Example:
        >>> rank_residual(torch.tensor([[3.0, 4.0], [3.0, 4.0]])), rank_residual(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]))
        (tensor(0.), tensor(1.))
    """
    x = _at_least_float32(x)
    return _residual_ratio(_residual_norm(x), _token_norms(x).squeeze(-1))


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
    norms = _token_norms(x)
    return _mean_cosine(_squared_unit_sum(x, norms), norms.squeeze(-1))


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


def _token_norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _residual_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x - x.mean(-2, keepdim=True), dim=(-2, -1))


def _residual_ratio(residual_norm: Tensor, norms: Tensor) -> Tensor:
    return residual_norm / torch.linalg.vector_norm(norms, dim=-1).clamp(min=torch.finfo(norms.dtype).tiny)


def _squared_unit_sum(x: Tensor, norms: Tensor) -> Tensor:
    units = x / norms.clamp(min=torch.finfo(x.dtype).tiny)
    return units.sum(-2).square().sum(-1)


def _mean_cosine(unit_sum: Tensor, norms: Tensor) -> Tensor:
    count = (norms != 0).sum(-1)
    return (unit_sum - count) / (count * (count - 1)).clamp(min=1)


def _composite_norm(x: Tensor) -> Tensor:
    sizes = x.abs()
    return (sizes.sum(-2).amax(-1) * sizes.sum(-1).amax(-1)).sqrt()
