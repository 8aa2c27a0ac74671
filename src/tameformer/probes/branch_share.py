"""How much of each residual sum is the branch: the dependency profile of the Admin paper.

In Liu et al. 2020, "Understanding the Difficulty of Training Transformers", arXiv:2004.08249, section 4, the normalized stream
after sum i is x̂ᵢ = Σⱼ βᵢⱼ âⱼ, a mixture of the outputs of all branches j ≤ i (and of the input, j = 0), each âⱼ scaled to
variance 1. Where these are centred and uncorrelated, Σⱼ βᵢⱼ² = 1, and at the sum r + f of residual and branch

    βᵢᵢ² = E[f²] / (E[f²] + E[r²])   and   βᵢⱼ² = (1 - βᵢᵢ²) βᵢ₋₁ⱼ²   for j < i,

because the sum scales all that was mixed before by one factor, and a norm after it scales everything. The first is the share
measured here; the second gives the whole profile from the shares. A perturbation of all weights moves the output by about
Σᵢ βᵢᵢ²: a constant share in every layer (Post-LN) amplifies it N-fold, a share of about 1/i (Pre-LN, Admin) log N-fold.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tameformer.probes.probe import Probe


class BranchShare(Probe):
    """Share of the branch in each residual sum, `diag/branch_share/<layer>`, from 0 to 1; about 0.04 ms a sum and step.

    Mean squares are over all tokens of the sequences looked at, padding included. Where a sum runs several times in a pass,
    the first counts.

    Args:
        sequences: How many sequences of a batch are looked at; None is all.
    """

    def __init__(self, *, sequences: int | None = 1) -> None:
        self.sequences = sequences
        self._values: dict[str, Tensor] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._values.clear()

    def on_branch(self, layer: str, residual: Tensor, branch: Tensor) -> None:
        """Measure the two parts of the sum."""
        key = f"diag/branch_share/{layer}"
        if key not in self._values:
            self._values[key] = branch_share(residual[: self.sequences], branch[: self.sequences])

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        return dict(self._values)


def branch_share(residual: Float[Tensor, "*shape"], branch: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """E[branch²] / (E[branch²] + E[residual²]), in float32; 0 where both are zero, NaN where an entry is not finite.

    Example:
        >>> branch_share(torch.full((2, 3), 3.0), torch.full((2, 3), -1.0))
        tensor(0.1000)
    """
    branch_norm = torch.linalg.vector_norm(branch, dtype=torch.float32)
    norm = torch.hypot(branch_norm, torch.linalg.vector_norm(residual, dtype=torch.float32))
    share = (branch_norm / norm.clamp(min=torch.finfo(torch.float32).tiny)).square()
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
