"""How large the residual stream is after each layer, and how heavy its tails are.

A few features that grow out of all proportion show in the largest value and in the kurtosis long before they show in the
RMS; they are what breaks low precision (Bondarenko et al. 2023, "Quantizable Transformers", arXiv:2306.12929, section 3;
He et al. 2024, arXiv:2405.19279).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tameformer.probes.probe import Probe


class Activations(Probe):
    """RMS, largest absolute value and kurtosis of the stream after each layer; no unit; about 0.1 ms a layer and step.

    `read` gives `diag/activation_rms/<block>`, `diag/activation_absmax/<block>` and `diag/activation_kurtosis/<block>`, over
    all tokens of the sequences looked at, padding included. Where a layer runs several times in a pass, the first counts.

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
        key = f"diag/activation_rms/{block}"
        if key not in self._values:
            rms, largest, kurtosis = activation_statistics(output[: self.sequences])
            self._values[key] = rms
            self._values[f"diag/activation_absmax/{block}"] = largest
            self._values[f"diag/activation_kurtosis/{block}"] = kurtosis

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        return dict(self._values)


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
    tiny = torch.finfo(torch.float32).tiny
    x = x.float().flatten()
    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high)
    scaled = x / largest.clamp(min=tiny)  # the largest is 1: no fourth power overflows
    mean = scaled.mean()
    squares = scaled.sub_(mean).square_()
    variance = squares.mean()
    kurtosis = squares.dot(squares) / squares.numel() / variance.square().clamp(min=tiny)
    return largest * (variance + mean.square()).sqrt(), largest, kurtosis
