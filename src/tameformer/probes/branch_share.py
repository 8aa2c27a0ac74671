"""How much of each residual sum is the branch: the dependency profile of the Admin paper.

In Liu et al. 2020, "Understanding the Difficulty of Training Transformers", arXiv:2004.08249, section 4, the normalized stream
after sum i is x̂ᵢ = Σⱼ βᵢⱼ âⱼ, a mixture of the outputs of all branches j ≤ i (and of the input, j = 0), each âⱼ scaled to
variance 1. Where these are centred and uncorrelated, Σⱼ βᵢⱼ² = 1, and at the sum r + f of residual and branch

    βᵢᵢ² = E[f²] / (E[f²] + E[r²])   and   βᵢⱼ² = (1 - βᵢᵢ²) βᵢ₋₁ⱼ²   for j < i,

because the sum scales all that was mixed before by one factor, and a norm after it scales everything. The first is the share
measured here; the second gives the whole profile from the shares. A perturbation of all weights moves the output by about
Σᵢ βᵢᵢ²: a constant share in every layer (Post-LN) amplifies it N-fold, a share of about 1/i (Pre-LN, Admin) log N-fold.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tameformer.probes.dead_units import spread_rows, stacked
from tameformer.probes.probe import Probe
from tameformer.shapes import Float


class BranchShare(Probe):
    """Share of the branch in each residual sum, `diag/branch_share/<layer>`, from 0 to 1; about 0.06 ms a sum and step.

    Mean squares are over the tokens looked at, padding included. Where a sum runs several times in a pass, the first counts.

    Args:
        tokens: How many tokens of the batch are looked at, evenly spread; None is all.
    """

    def __init__(self, *, tokens: int | None = 128) -> None:
        self.tokens = tokens
        self._norms: dict[str, Sequence[Tensor]] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._norms.clear()

    def on_branch(self, layer: str, residual: Tensor, branch: Tensor) -> None:
        """Measure the two parts of the sum."""
        if layer not in self._norms:
            self._norms[layer] = _norms(spread_rows(residual, self.tokens), spread_rows(branch, self.tokens))

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        return {
            f"diag/branch_share/{layer}": share
            for layers, norms in stacked(self._norms)
            for layer, share in zip(layers, _share(*norms), strict=True)
        }


def branch_share(residual: Float[Tensor, "*shape"], branch: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """E[branch²] / (E[branch²] + E[residual²]), in float32; 0 where both are zero, NaN where an entry is not finite.

    Example:
        >>> branch_share(torch.full((2, 3), 3.0), torch.full((2, 3), -1.0))
        tensor(0.1000)
    """
    return _share(*_norms(residual, branch))


def _norms(*tensors: Tensor) -> list[Tensor]:
    # flat, because on a CPU a norm over rows that lie apart takes twice as long as copying them and that of the copy
    return [torch.linalg.vector_norm(tensor.flatten(), dtype=torch.float32) for tensor in tensors]


def _share(residual_norm: Tensor, branch_norm: Tensor) -> Tensor:
    norm = torch.hypot(residual_norm, branch_norm)
    share = (branch_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)).square()
    return torch.where(norm.isfinite(), share, torch.nan)  # an infinite residual would leave a share of 0


def dependency_profile(shares: Float[Tensor, " sums"]) -> Float[Tensor, "sums sources"]:
    """βᵢⱼ² from the shares of the sums in the order they run; column 0 is the input, column j branch j. Rows sum to 1.

    Example:
        >>> dependency_profile(torch.tensor([0.5, 0.2]))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.4000, 0.4000, 0.2000]])
    """
    profile = shares.new_zeros(len(shares), len(shares) + 1)
    row = profile.new_zeros(len(shares) + 1)
    row[0] = 1
    for index, share in enumerate(shares):
        row = row * (1 - share)
        row[index + 1] = share
        profile[index] = row
    return profile
