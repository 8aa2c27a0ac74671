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
    clipped: list[float] = field(default_factory=list)
    """1 for each that was clipped, 0 for others; empty where nothing clips."""
    limits: dict[str, float] = field(default_factory=dict)
    """The limits that clipping had last, by group, where they move."""
    num_skipped: int = 0
    """Steps that were not taken: they are counted, told as events, and part of no mean."""

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_items(self) -> float:
        """Targets learned from since the last line."""
        return sum(self.items)

    def add(self, loss: float, norm: float, num_items: float, *, clip: Mapping[str, float] | None = None) -> None:
        """Remember a step that was taken, with what clipping said of it."""
        told = dict(clip or {})
        if "clipped" in told:
            self.clipped.append(told.pop("clipped"))
        self.limits |= {key: value for key, value in told.items() if math.isfinite(value)}  # infinite while not known
        self.losses.append(loss)
        self.norms.append(norm)
        self.items.append(num_items)

    def line(self) -> dict[str, float]:
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
        if self.clipped:
            values["train/clip_rate"] = sum(self.clipped) / len(self.clipped)
        return values | {f"train/clip_{key}": value for key, value in self.limits.items()}

    def state(self) -> dict[str, Any]:
        """All of it, as plain numbers."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Interval":
        """An interval that a checkpoint interrupted."""
        losses, norms, items, clipped = (list(state.get(name, ())) for name in ("losses", "norms", "items", "clipped"))
        return cls(losses, norms, items, clipped, dict(state.get("limits", {})), state["num_skipped"])
