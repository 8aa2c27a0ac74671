"""What happened since the last line of the log."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Interval:
    """Collects the results of steps; its state is part of a checkpoint, so that a resumed run writes the same lines."""

    losses: list[float] = field(default_factory=list)
    """Mean loss per target of each step that was taken, over all processes."""
    norms: list[float] = field(default_factory=list)
    """Gradient norm of each."""
    items: list[float] = field(default_factory=list)
    """Targets of each."""
    num_skipped: int = 0
    """Steps that were not taken: they are counted, told as events, and part of no mean."""

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_items(self) -> float:
        """Targets learned from since the last line."""
        return sum(self.items)

    def add(self, loss: float, norm: float, num_items: float) -> None:
        """Remember a step that was taken."""
        self.losses.append(loss)
        self.norms.append(norm)
        self.items.append(num_items)

    def line(self, *, max_grad_norm: float | None) -> dict[str, float]:
        """The measurements of the log: every target weighs the same."""
        values: dict[str, float] = {"train/skipped": float(self.num_skipped)} if self.num_skipped else {}
        if not len(self):
            return values
        weighted = [loss * items for loss, items in zip(self.losses, self.items, strict=True)]
        values |= {
            "train/loss": math.fsum(weighted) / self.num_items,
            "train/grad_norm": math.fsum(self.norms) / len(self),
            "train/grad_norm_max": max(self.norms),
        }
        if max_grad_norm is not None:
            values["train/clip_rate"] = sum(norm > max_grad_norm for norm in self.norms) / len(self)
        return values

    def state(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Interval":
        """An interval that a checkpoint interrupted."""
        losses, norms, items = (list(state[name]) for name in ("losses", "norms", "items"))
        return cls(losses, norms, items, state["num_skipped"])
