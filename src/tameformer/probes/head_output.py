"""How much each attention head does beside the others of its layer.

Many heads of a trained model can be cut away without a loss (Michel et al. 2019, "Are Sixteen Heads Really Better than One?",
arXiv:1905.10650). What a head gives at every position alike is a bias of the layer, whatever it attends to; so the mean over
positions is taken out here, and a head that is constant counts as dead.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tameformer.probes.dead_units import stacked
from tameformer.probes.probe import Probe
from tameformer.shapes import Float


class HeadOutput(Probe):
    """Size of each head's output against that of its layer, `diag/head_output/<layer>`; about 0.06 ms a layer and step.

    One value a head, 1 for a head like the others, near 0 for a dead one. It compares heads only: where the whole layer does
    nothing, that shows in the share of its branch. A single query position has no deviation, and gives nothing. The first
    attention of a layer in a pass counts; padding takes part.

    Args:
        positions: How many query positions of each sequence are looked at, evenly spread; None is all.
    """

    def __init__(self, *, positions: int | None = 128) -> None:
        self.positions = positions
        self._squares: dict[str, Sequence[Tensor]] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._squares.clear()

    def on_heads(self, layer: str, output: Tensor) -> None:
        """Measure what the heads gave."""
        if layer not in self._squares and output.shape[2] > 1:
            spacing = 1 if self.positions is None else -(-output.shape[2] // self.positions)
            self._squares[layer] = [_squares(output[:, :, ::spacing])]

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        return {
            f"diag/head_output/{layer}": sizes
            for layers, (squares,) in stacked(self._squares)
            for layer, sizes in zip(layers, _relative(squares), strict=True)
        }


def head_output(output: Float[Tensor, "batch heads query value_dim"]) -> Float[Tensor, " heads"]:
    """RMS of each head's deviation from its mean over positions, divided by the RMS of all heads' deviations; in float32.

    The squares of a layer's values have mean 1. All are 0 where no head deviates; NaN where an entry is not finite.

    Example:
        >>> head_output(torch.tensor([[[[5.0], [5.0]], [[3.0], [-3.0]]]]))  # the first head gives 5 everywhere
        tensor([0.0000, 1.4142])
    """
    return _relative(_squares(output))


def _squares(output: Tensor) -> Tensor:
    output = output.float()
    return (output - output.mean(2, keepdim=True)).square_().sum((0, 2, 3))


def _relative(squares: Tensor) -> Tensor:
    return (squares / squares.mean(-1, keepdim=True).clamp(min=torch.finfo(squares.dtype).tiny)).sqrt()
