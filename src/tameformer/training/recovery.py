"""What the loop needs to go back: who decides, which checkpoint, and whether a snapshot is fit to be kept."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tameformer.errors import CheckpointError
from tameformer.training.checkpoint import CheckpointFolder, Snapshot, verify

_LARGEST = torch.finfo(torch.float32).max


@runtime_checkable
class Answer(Protocol):
    """What is to be done about a step that was not taken."""

    @property
    def do(self) -> Literal["go_on", "roll_back", "stop"]:
        """Whether the run goes on, goes back to a checkpoint, or ends."""
        ...

    @property
    def kind(self) -> str:
        """What the event is called."""
        ...

    @property
    def message(self) -> str:
        """What happened and what to try, in words."""
        ...

    @property
    def details(self) -> Mapping[str, Any]:
        """The same in values."""
        ...

    @property
    def kept_from(self) -> int:
        """The last step whose checkpoint is beyond doubt."""
        ...


@runtime_checkable
class Guard(Protocol):
    """Decides which steps are taken. Equal numbers give equal answers, so that all processes do the same."""

    @property
    def rate_factor(self) -> float:
        """Factor on the learning rate."""
        ...

    def limits(self) -> tuple[float, float]:
        """The largest mean loss and gradient norm with which the next step is taken."""
        ...

    def observe(self, step: int, loss: float, norm: float, *, taken: bool, places: Sequence[str]) -> Answer | None:
        """Learn from a step; an answer where it was not taken."""
        ...

    def conclude(self, step: int) -> Answer | None:
        """An answer where a run must not end with this step, its last."""
        ...

    def horizon(self, step: int) -> int:
        """The last step whose checkpoint is beyond doubt, seen from `step`."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        ...

    def rolled_back(self, lost: Mapping[str, Any]) -> None:
        """The run stands at a checkpoint again, whose state was loaded; `lost` is the state before that."""
        ...


@runtime_checkable
class Finding(Protocol):
    """What begins to go wrong; `str` says it in words."""

    @property
    def details(self) -> Mapping[str, Any]:
        """The same in values."""
        ...


@runtime_checkable
class Detectors(Protocol):
    """Say what begins to go wrong: a function of the measurements so far."""

    def observe(self, step: int, values: Mapping[str, float]) -> Sequence[Finding]:
        """What begins with these measurements."""
        ...

    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        ...


def anchors_to_keep(anchors: Sequence[int], *, keep_last: int, horizon: int) -> list[int]:
    """Of the checkpoints that the schedule made, oldest first: the newest, and the one that a rollback would take.

    Those made because of a signal are not among them: a run that was interrupted must go back to where one that was not would.

    Example:
        >>> anchors_to_keep([10, 20, 30, 40], keep_last=2, horizon=25)
        [20, 30, 40]
    """
    sound = [step for step in anchors if step <= horizon]
    return sorted({*anchors[-keep_last:], *sound[-1:]})


def rollback_target(checkpoints: CheckpointFolder, anchors: Iterable[int], *, horizon: int) -> Path | None:
    """The newest checkpoint up to the horizon, or else the oldest there is; None when none verifies."""
    anchors = sorted(anchors)
    ranked = [step for step in reversed(anchors) if step <= horizon] + [step for step in anchors if step > horizon]
    for step in ranked:
        try:
            verify(checkpoints.path(step))
        except CheckpointError:
            continue
        return checkpoints.path(step)
    return None


def first_not_finite(snapshot: Snapshot, parameters: Iterable[str]) -> str | None:
    """The first weight, or part of the optimizer's state, that is not finite; None for a snapshot that is in order.

    Buffers may be: a mask holds minus infinity.
    """
    tensors = {name: snapshot.model[name] for name in parameters if name in snapshot.model} | snapshot.optimizer
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in floats.values():
        by_device.setdefault(tensor.device, []).append(tensor)
    largest = (
        torch.stack([each.float() for each in torch._foreach_norm(group, torch.inf)])  # pyright: ignore
        for group in by_device.values()
    )
    if all(bool(values.isfinite().all()) for values in largest):
        return None
    return next(name for name, tensor in floats.items() if not bool(tensor.isfinite().all()))
