"""How large the residual stream is after each layer, and how heavy its tails are.

A few features that grow out of all proportion show in the largest value and in the kurtosis long before they show in the
RMS; they are what breaks low precision (Bondarenko et al. 2023, "Quantizable Transformers", arXiv:2306.12929, section 3;
He et al. 2024, arXiv:2405.19279).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tameformer.probes.dead_units import spread_rows, stacked
from tameformer.probes.probe import Probe
from tameformer.shapes import Float

QUANTITIES = ("activation_rms", "activation_absmax", "activation_kurtosis")


class Activations(Probe):
    """RMS, largest absolute value and kurtosis of the stream after each layer; no unit; about 0.1 ms a layer and step.

    `read` gives `diag/activation_rms/<block>`, `diag/activation_absmax/<block>` and `diag/activation_kurtosis/<block>`, over
    the tokens looked at, padding included. Where a layer runs several times in a pass, the first counts.

    Args:
        tokens: How many tokens of the batch are looked at, evenly spread, the first always among them; None is all.
    """

    def __init__(self, *, tokens: int | None = 128) -> None:
        self.tokens = tokens
        self._moments: dict[str, Sequence[Tensor]] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._moments.clear()

    def on_block(self, block: str, input: Tensor, output: Tensor) -> None:
        """Measure what the layer gave."""
        if block not in self._moments:
            self._moments[block] = _moments(spread_rows(output, self.tokens))

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        values = {}
        for blocks, moments in stacked(self._moments):
            for quantity, numbers in zip(QUANTITIES, _statistics(*moments), strict=True):
                values |= {f"diag/{quantity}/{block}": number for block, number in zip(blocks, numbers, strict=True)}
        return values


def activation_statistics(
    x: Float[Tensor, "..."],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """RMS, largest absolute value and kurtosis of all entries, in float32; NaN where an entry is NaN or infinite.

    The RMS is sqrt(E[x²]), about zero. The kurtosis is E[c⁴] / E[c²]², where c = x - E[x] and E is the mean over all entries
    alike: 3 for a normal distribution, 1 for two equally likely values, the number of entries for a single large one. Where
    all entries are equal it is 0, a value that it takes nowhere else. The largest value alone is infinite where an entry is.

    Example:
        >>> [round(value.item(), 2) for value in activation_statistics(torch.tensor([-2.0, 2.0, -2.0, 2.0]))]
        [2.0, 2.0, 1.0]
    """
    return _statistics(*_moments(x))


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest absolute value; of x divided by it the mean and the second and fourth central moment."""
    x = x.float().flatten()
    largest = x.abs().amax()
    scaled = x / largest.clamp(min=torch.finfo(x.dtype).tiny)  # the largest is 1: no fourth power overflows
    mean = scaled.mean()
    second = scaled.sub_(mean).dot(scaled) / x.numel()
    squares = scaled.square_()
    return largest, mean, second, squares.dot(squares) / x.numel()


def _statistics(largest: Tensor, mean: Tensor, second: Tensor, fourth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kurtosis = fourth / second.square().clamp(min=torch.finfo(second.dtype).tiny)
    return largest * (second + mean.square()).sqrt(), largest, kurtosis
