"""What the loop is handed: finished objects, and how often to do what."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from tameformer.optim.clipping import Clip
from tameformer.training.checkpoint import CheckpointConfig
from tameformer.training.engine import Engine
from tameformer.training.recovery import Detectors, Guard
from tameformer.training.step import Batch, Loss

Evaluation = Callable[[Engine, nn.Module], dict[str, float]]
"""From a model to metrics such as `loss`, over all processes; the model comes in evaluation mode, without gradients."""


@runtime_checkable
class Plan(Protocol):
    """Where a step lies in the passes over the data."""

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of a step and its number within the epoch."""
        ...

    def steps_in_epoch(self, epoch: int) -> int:
        """How many steps an epoch has."""
        ...


def epochs(plan: Plan, position: int) -> float:
    """Passes over the data that this many steps of the plan are."""
    if position == 0:
        return 0.0
    epoch, step = plan.locate(position - 1)
    return epoch + (step + 1) / plan.steps_in_epoch(epoch)


@runtime_checkable
class Stream(Protocol):
    """The micro-batches of one process, step by step."""

    def __call__(self, *, start: int, stop: int, rank: int, world_size: int) -> Iterator[Sequence[Batch]]:
        """The micro-batches of each step from `start` to before `stop`."""
        ...


@runtime_checkable
class Watch(Protocol):
    """Measures inside the model in some of the steps, without changing any."""

    def due(self, step: int) -> bool:
        """Whether something is measured in the step that is number `step`, counted from 1."""
        ...

    def watching(self, step: int) -> AbstractContextManager[None]:
        """Measure that step, which runs inside."""
        ...

    def tell_norms(self, parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        """The norms of the gradients of that step as the optimizers get them, where clipping computed them anyway."""
        ...

    def read(self) -> Mapping[str, Tensor]:
        """What the last watched step gave, on the device, by `diag/<quantity>/<layer>`; a vector has a value a head."""
        ...

    def unseen(self) -> Sequence[str]:
        """What could not be measured so far, as `name: reason`."""
        ...

    def summary(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """A few numbers for the log of the run, from the values on the host by `diag/<quantity>/<layer>[/<head>]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How often the loop does what."""

    logging_steps: int = 10
    """Steps between lines of the log."""
    eval_steps: int | None = None
    """Steps between evaluations; null evaluates at the end of each epoch."""
    eval_on_start: bool = False
    """Evaluate before the first step, too: the loss that training starts from."""
    early_stopping_patience: int | None = None
    """Stop after this many evaluations without a better `checkpoint.best_metric`; null never stops early."""
    pause_after: float | None = None
    """Share of the run after which it evaluates, saves and stops; `--resume auto` with a larger share, or null, goes on."""
    hang_timeout: float | None = 1800.0
    """Seconds without a batch, in training or evaluation, after which the run says where it hangs, and the command ends."""

    def pause_step(self, max_steps: int) -> int | None:
        """The step after which a run of this length pauses; None for one that runs to its end.

        Example:
            >>> LoopConfig(pause_after=0.3).pause_step(10), LoopConfig(pause_after=0.3).pause_step(11)
            (3, 4)
        """
        if self.pause_after is None:
            return None
        step = math.ceil(self.pause_after * max_steps - 1e-9)  # 0.3 * 10 is a little more than 3 in binary
        return step if step < max_steps else None

    def __post_init__(self) -> None:
        for name in ("logging_steps", "eval_steps", "early_stopping_patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"loop.{name} must be at least 1, got {value}")
        if self.pause_after is not None and not 0 < self.pause_after <= 1:
            raise ValueError(f"loop.pause_after must lie in (0, 1], got {self.pause_after}; null runs to the end")
        if self.hang_timeout is not None and not self.hang_timeout > 0:
            raise ValueError(f"loop.hang_timeout must be positive, got {self.hang_timeout}; null waits for ever")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that one training run consists of."""

    model: nn.Module
    """The model, with its patches applied."""
    loss: Loss
    """The loss of a batch, summed over its targets."""
    batches: Stream
    """The training data."""
    plan: Plan
    """The epochs of the training data."""
    optimizers: Sequence[Optimizer]
    """Each parameter in exactly one."""
    schedule: Callable[[int], float]
    """From the step to the factor on every group's peak rate."""
    max_steps: int
    """Optimizer steps in the whole run."""
    unit: str
    """What `num_items` counts: "samples" or "tokens"."""
    clip: Clip
    """Makes the gradients of these optimizers smaller where it sees fit."""
    average: AveragedModel | None = None
    """The moving average of the weights, which is evaluated and saved in addition."""
    evaluate: Evaluation | None = None
    """Metrics during the run."""
    test: Evaluation | None = None
    """Metrics once, at the end, on data that decided nothing."""
    guard: Guard
    """Which steps are taken, and what follows when they are not."""
    detectors: Detectors | None = None
    """What is told of the measurements; they change nothing."""
    watch: Watch | None = None
    """What is measured inside the model, and in which steps."""
    set_attention_dtype: Callable[[torch.dtype | None], object] = lambda dtype: None
    """Sets the precision inside attention where the model can."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Text files by name that belong into the run folder, such as a tokenizer."""
    seed: int = 0
    """Seeds dropout and everything else that is random inside a step, together with the step's number."""
    loop: LoopConfig
    """How often to log and evaluate."""
    checkpoint: CheckpointConfig
    """When to save."""
