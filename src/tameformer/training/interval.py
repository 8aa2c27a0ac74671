"""What happened since the last line of the log. Tensors stay on the device until the line is due, then move together."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tameformer.training.engine import Engine
from tameformer.training.step import StepResult


class Interval:
    """Collects the results of steps; its state is part of a checkpoint, so that a resumed run writes the same lines."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._items: list[float] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def num_items(self) -> float:
        """Targets seen since the last line."""
        return sum(self._items)

    def add(self, result: StepResult) -> None:
        """Remember one step; nothing waits for the device."""
        self._losses.append(result.loss_sum)
        self._norms.append(result.grad_norm)
        self._items.append(result.num_items)

    def tensors(self, engine: Engine) -> dict[str, Tensor]:
        """Loss, summed over all processes, and gradient norm of each step, on the device; nothing waits for it."""
        return {"loss": engine.sum_tensor(torch.stack(self._losses)), "norm": torch.stack(self._norms)}

    def on_host(self, numbers: Mapping[str, float]) -> tuple[list[float], list[float]]:
        """Mean loss per target and gradient norm of each step, from `tensors` on the host by `loss/0`, `norm/0`, ..."""
        losses = [numbers[f"loss/{index}"] / items for index, items in enumerate(self._items)]
        return losses, [numbers[f"norm/{index}"] for index in range(len(self))]

    def line(self, losses: list[float], norms: list[float], *, max_grad_norm: float | None) -> dict[str, float]:
        """The measurements of the log: every target weighs the same; a non-finite step makes its mean non-finite."""
        weighted = [loss * items for loss, items in zip(losses, self._items, strict=True)]
        finite = all(map(math.isfinite, losses))
        values = {
            "train/loss": math.fsum(weighted) / self.num_items if finite else first_non_finite(losses),
            "train/grad_norm": math.fsum(norms) / len(norms)
            if all(map(math.isfinite, norms))
            else first_non_finite(norms),
            "train/grad_norm_max": max(norms, key=lambda norm: (not math.isfinite(norm), norm)),
        }
        if max_grad_norm is not None:
            values["train/clip_rate"] = sum(not norm <= max_grad_norm for norm in norms) / len(norms)
        return values

    def state(self) -> dict[str, Any]:
        """This process's part, as plain numbers."""
        return {
            "losses": [float(value) for value in self._losses],
            "norms": [float(value) for value in self._norms],
            "items": self._items,
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continue an interval that a checkpoint interrupted."""
        self._losses = [torch.tensor(value, device=device) for value in state["losses"]]
        self._norms = [torch.tensor(value, device=device) for value in state["norms"]]
        self._items = list(state["items"])


def first_non_finite(values: list[float]) -> float:
    """The first NaN or infinity among the values.

    Example:
        >>> first_non_finite([1.0, math.inf, math.nan])
        inf
    """
    return next(value for value in values if not math.isfinite(value))
