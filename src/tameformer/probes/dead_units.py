"""Hidden units of the feed-forward layers that no token of a step opens.

A ReLU unit that is zero for every token gets no gradient and stays so (Lu et al. 2019, "Dying ReLU and Initialization",
arXiv:1903.06733). GELU and SiLU let a little through below zero, at most 0.17 and 0.28, so there such a unit is closed rather
than dead.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tameformer.probes.probe import Probe
from tameformer.shapes import Float


class DeadUnits(Probe):
    """Share of hidden units above zero for no token looked at, `diag/dead_units/<layer>`; about 0.06 ms a layer and step.

    An upper bound on the share of dead units: one that opens for a token in a hundred looks dead in 256 tokens with
    probability 0.08. Where an activation runs several times in a pass, the first counts.

    Args:
        tokens: How many tokens of the batch are looked at, evenly spread; None is all.
    """

    def __init__(self, *, tokens: int | None = 256) -> None:
        self.tokens = tokens
        self._largest: dict[str, Sequence[Tensor]] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._largest.clear()

    def on_activation(self, layer: str, output: Tensor) -> None:
        """Measure what the activation function gave."""
        if layer not in self._largest:
            self._largest[layer] = [spread_rows(output, self.tokens).amax(0)]

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        return {
            f"diag/dead_units/{layer}": share
            for layers, (largest,) in stacked(self._largest)
            for layer, share in zip(layers, _closed(largest), strict=True)
        }


def dead_share(output: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, ""]:
    """Share of the hidden units that are above zero for no token; NaN where the largest of a unit is not finite.

    Example:
        >>> dead_share(torch.tensor([[0.0, 1.0], [-0.1, -0.1]]))
        tensor(0.5000)
    """
    return _closed(output.flatten(0, -2).amax(0))


def _closed(largest: Tensor) -> Tensor:
    return torch.where(largest.isfinite(), (largest <= 0).float(), torch.nan).mean(-1)


def spread_rows(x: Float[Tensor, "*tokens width"], limit: int | None) -> Float[Tensor, "rows width"]:
    """Up to `limit` tokens of a batch, evenly spaced over all of it; None is all tokens. A view where memory allows.

    The spacing has no factor in common with the length of a sequence, so that all positions take part: with 32 for sequences
    of 16 tokens, only first tokens would.

    Example:
        >>> spread_rows(torch.arange(12.0).reshape(3, 4, 1), 6).flatten()
        tensor([0., 3., 6., 9.])
    """
    rows = x.flatten(0, -2)
    if limit is None or len(rows) <= limit:
        return rows
    spacing = -(-len(rows) // limit)
    while x.dim() > 2 and math.gcd(spacing, x.shape[-2]) > 1:
        spacing += 1
    return rows[::spacing]


def stacked(parts: Mapping[str, Sequence[Tensor]]) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Each of the small tensors that layers have, as one tensor with the layers as first axis.

    What is left to do then costs one operation for all layers. Layers whose tensors differ in shape, type or device come
    apart.

    Example:
        >>> [(layers, part.tolist()) for layers, (part,) in stacked({"a": [torch.tensor(1)], "b": [torch.tensor(2)]})]
        [(['a', 'b'], [1, 2])]
    """
    groups: dict[object, list[str]] = {}
    for layer, tensors in parts.items():
        groups.setdefault(tuple((part.shape, part.dtype, part.device) for part in tensors), []).append(layer)
    for layers in groups.values():
        yield layers, [torch.stack(part) for part in zip(*(parts[layer] for layer in layers), strict=True)]
