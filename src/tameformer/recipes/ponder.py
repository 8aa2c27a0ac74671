"""What thinking longer costs: the mean number of steps of a Universal Transformer that halts by itself, in the loss.

Graves 2016, "Adaptive Computation Time", arXiv:1603.08983, section 2.1; without it every position takes all the steps it may.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tameformer.models import UniversalConfig, ponder_cost
from tameformer.training.step import Batch, Loss


def with_ponder_cost(loss: Loss, model: Any, real: Callable[[Batch], Tensor] | None = None) -> Loss:
    """The loss and, for each target, `ponder_weight` times the steps a position took on average; `model` is its configuration.

    Models of other kinds, and those that take a fixed number of steps, get the loss as it is. `real` says which positions of a
    batch are no padding, (batch, seq): padding takes steps, too, but nobody waits for an answer there.
    """
    if not isinstance(model, UniversalConfig) or model.halting == "fixed":
        return loss
    weight = model.ponder_weight

    def total(model: nn.Module, batch: Batch) -> Tensor:
        found = loss(model, batch)
        return found + weight * batch["num_items"] * ponder_cost(model, None if real is None else real(batch))

    return total
