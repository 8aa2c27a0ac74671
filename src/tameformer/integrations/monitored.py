"""What the callbacks share: a `Monitor` on what a trainer hands out."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tameformer.health import Monitor
from tameformer.record import LOG


def monitored(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    output_dir: str | Path | None,
    default_dir: Path,
    start_step: int,
    **options: Any,
) -> Monitor:
    """A monitor whose steps begin with `begin()`, on the optimizers inside the trainer's wrappers.

    Args:
        model: The model whose forward pass is watched.
        optimizers: As the trainer gives them.
        output_dir: The run folder; None takes `free_folder(default_dir, start_step)`.
        default_dir: The run folder where the user names none.
        start_step: Optimizer steps done before.
        options: For `Monitor`.

    Raises:
        RecordError: `output_dir` holds a run already, and `start_step` is 0.
    """
    folder = free_folder(default_dir, start_step) if output_dir is None else Path(output_dir)
    inner = [real_optimizer(optimizer) for optimizer in optimizers]
    return Monitor(model, inner, output_dir=folder, start_step=start_step, begins=True, **options)


def free_folder(default: Path, start_step: int) -> Path:
    """The first of `default`, `default-2`, ... without a run; for a run that goes on, the last one with a run.

    A trainer that is started twice keeps both records, and is not stopped for the sake of being watched.
    """
    names = (default if number == 1 else default.with_name(f"{default.name}-{number}") for number in count(1))
    last = default
    for folder in names:
        if not (folder / LOG).exists():
            return last if start_step else folder
        last = folder
    raise AssertionError("there is always a next number")


def real_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps: wrappers pass a step on, but know nothing of hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
