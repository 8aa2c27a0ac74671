"""Faults on purpose, so that users can rehearse on their own run what happens when things go wrong.

    nan@120             the loss of batch 120 is NaN; nan@eval: the first evaluation's metrics are
    inf-grad@50         one entry of one gradient is infinite, the loss is not
    spike@200x1000      loss and gradient are a thousand times as large
    bad-batch@300       its images are NaN, or its targets belong to other inputs
    kill@400, term@500  SIGKILL, SIGTERM to the process itself; also kill@save, kill@eval: in the first one
    hang@400            the step never returns; also hang@save, hang@eval
    oom@400             the device has no memory for the batch
    enospc@save         the disk is full when the first checkpoint is written; eio@save: it cannot be written to
    corrupt@latest      a byte of the newest checkpoint is changed, before a resume looks for one
    nan@120-128         from batch 120 to batch 128; nan@120:rank1 strikes on that process only

Numbers count batches of the data, from 1: a run that went back does not meet the same fault again. Signals, `hang` and
`corrupt` strike once in the life of a run folder, all others whenever their batch is met, so that a run resumed from before
one repeats it.
"""

import errno
import os
import re
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tameformer.errors import ConfigError
from tameformer.training.checkpoint import MODEL, CheckpointFolder
from tameformer.training.engine import Engine
from tameformer.training.run import Run
from tameformer.training.step import Batch

Tell = Callable[[int, str, str, Mapping[str, Any]], object]
_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
_DISK_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_ONCE = {*_SIGNALS, "hang", "corrupt"}
_PLACES: Mapping[str, tuple[str, ...]] = {
    "nan": ("step", "eval"),
    "inf-grad": ("step",),
    "spike": ("step",),
    "bad-batch": ("step",),
    "kill": ("step", "eval", "save"),
    "term": ("step", "eval", "save"),
    "hang": ("step", "eval", "save"),
    "oom": ("step",),
    "enospc": ("save",),
    "eio": ("save",),
    "corrupt": ("latest",),
}
_FORM = re.compile(
    r"(?P<kind>[a-z-]+)@(?:(?P<first>\d+)(?:-(?P<last>\d+))?|(?P<place>[a-z]+))(?:x(?P<factor>[0-9.e+]+))?(?::rank(?P<rank>\d+))?"
)


@dataclass(frozen=True)
class Fault:
    """One thing to go wrong."""

    text: str
    """As it was written."""
    kind: str
    place: Literal["step", "eval", "save", "latest"] = "step"
    first: int = 0
    """Batch that it strikes at, from 1 ..."""
    last: int = 0
    """... until this one."""
    factor: float = 1000.0
    """Of a spike."""
    rank: int | None = None
    """The process it strikes on; None is all."""


def parse(text: str) -> list[Fault]:
    """The faults of a list such as `nan@120,kill@400`.

    Raises:
        ConfigError: A fault that does not exist, or a place it cannot strike at.

    Example:
        >>> parse("spike@200x50")
        [Fault(text='spike@200x50', kind='spike', place='step', first=200, last=200, factor=50.0, rank=None)]
    """
    return [_parse_one(part.strip()) for part in text.split(",") if part.strip()]


def _parse_one(text: str) -> Fault:
    found = _FORM.fullmatch(text)
    kinds = ", ".join(_PLACES)
    if found is None or found["kind"] not in _PLACES:
        raise ConfigError(
            f"--inject {text}: expected KIND@BATCH such as nan@120 or spike@200x1000, with a KIND among {kinds}"
        )
    kind, place = found["kind"], found["place"] or "step"
    if place not in _PLACES[kind] or (found["place"] == "step"):
        where = " or ".join("the number of a batch" if place == "step" else place for place in _PLACES[kind])
        raise ConfigError(f"--inject {text}: {kind} strikes at {where}, got {found['place'] or found['first']}")
    if found["factor"] and kind != "spike":
        raise ConfigError(f"--inject {text}: only a spike has a factor, remove x{found['factor']}")
    first = int(found["first"] or 0)
    last = int(found["last"] or first)
    if place == "step" and not 1 <= first <= last:
        raise ConfigError(f"--inject {text}: batches count from 1, and a range goes upwards")
    rank = None if found["rank"] is None else int(found["rank"])
    try:
        factor = float(found["factor"] or 1000.0)
    except ValueError as error:
        raise ConfigError(f"--inject {text}: the factor is no number") from error
    return Fault(text, kind, cast(Any, place), first, last, factor, rank)


class Faults:
    """Faults, and what it takes to make them happen in a run.

    Args:
        faults: What shall go wrong.
        rank: This process.
        tell: Told of each fault just before it strikes: step, kind, message, details.
        spent: Texts of faults that have struck before in this run folder.
    """

    def __init__(self, faults: Sequence[Fault], *, rank: int, tell: Tell, spent: Sequence[str] = ()) -> None:
        self._faults = [fault for fault in faults if not (fault.kind in _ONCE and fault.text in spent)]
        self._rank, self.tell = rank, tell
        self._batch = 0
        self._due: list[Fault] = []

    def install(self, run: Run) -> Run:
        """The run in which they happen."""
        evaluate = run.evaluate

        def batches(*, start: int, stop: int, rank: int, world_size: int) -> Generator[Sequence[Batch], None, None]:
            stream = run.batches(start=start, stop=stop, rank=rank, world_size=world_size)
            with closing(cast(Any, stream)):
                for number, micro_batches in enumerate(stream, start=start + 1):
                    self._batch = number
                    yield self._at_batch(micro_batches)

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            due, self._due = self._due, []  # in the first micro-batch only
            value = run.loss(model, batch)
            if any(fault.kind == "oom" for fault in due):
                self._due = [fault for fault in due if fault.kind != "oom"]  # the batch comes again
                torch.empty(2**62, dtype=torch.uint8, device=value.device)  # what the allocator says is no fiction
            return _spoilt(value, model, due)

        def evaluated(engine: Engine, model: nn.Module) -> dict[str, float]:
            assert evaluate is not None
            struck = self._at_place("eval")
            values = evaluate(engine, model)
            return dict.fromkeys(values, float("nan")) if struck else values

        return replace(run, batches=batches, loss=loss, evaluate=None if evaluate is None else evaluated)

    def at_save(self, folder: Path) -> None:
        """To be called when the files of a checkpoint are written and it is not yet published.

        Raises:
            OSError: The disk fails.
        """
        for fault in self._met("save"):
            if self._strike(fault) and fault.kind in _DISK_ERRORS:
                number = _DISK_ERRORS[fault.kind]
                raise OSError(number, os.strerror(number), folder.name)

    def at_resume(self, run_folder: Path) -> None:
        """To be called before the newest checkpoint is looked for.

        Raises:
            ConfigError: There is no checkpoint to damage.
        """
        checkpoints = CheckpointFolder(run_folder)
        for fault in self._met("latest"):
            if not checkpoints.steps():
                raise ConfigError(
                    f"--inject {fault.text}: {run_folder} holds no checkpoint yet; train first, then --resume"
                )
            newest = checkpoints.path(checkpoints.steps()[-1])
            flip_a_byte(newest / MODEL)
            self.tell(
                checkpoints.steps()[-1], "injected", f"injected {fault.text}: {newest.name}", {"fault": fault.text}
            )

    def _at_batch(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        met = [fault for fault in self._faults if fault.place == "step" and fault.first <= self._batch <= fault.last]
        self._due = [fault for fault in met if self._strike(fault)]
        if any(fault.kind == "bad-batch" for fault in self._due):
            return [_bad(batch) for batch in micro_batches]
        return micro_batches

    def _at_place(self, place: str) -> bool:
        """Strike what is waiting for a place; whether the numbers that come of it are to be spoilt."""
        return any([self._strike(fault) and fault.kind == "nan" for fault in self._met(place)])

    def _met(self, place: str) -> list[Fault]:
        """The faults of a place, which meet it once."""
        met = [fault for fault in self._faults if fault.place == place]
        self._faults = [fault for fault in self._faults if fault.place != place]
        return met

    def _strike(self, fault: Fault) -> bool:
        """Tell, send the signal if it is one, and say whether this process is meant."""
        at = f"batch {self._batch}" if fault.place == "step" else f"{fault.place} after batch {self._batch}"
        self.tell(self._batch, "injected", f"injected {fault.text}, at {at}", {"fault": fault.text})
        if fault.rank not in (None, self._rank):
            return False
        if fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.kind])
        while fault.kind == "hang":
            time.sleep(3600)
        return True


def flip_a_byte(file: Path) -> None:
    """Change the last byte of a file in place, as a bad disk might."""
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))


def _spoilt(loss: Tensor, model: nn.Module, due: Sequence[Fault]) -> Tensor:
    for fault in due:
        match fault.kind:
            case "nan":
                loss = loss * float("nan")
            case "spike":
                loss = loss * fault.factor
            case "inf-grad":
                first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
                loss = loss + cast(Tensor, _InfiniteGradient.apply(first)).to(loss)
    return loss


class _InfiniteGradient(torch.autograd.Function):
    """Zero, with a gradient whose first entry is infinite."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Zero."""
        ctx.save_for_backward(parameter)
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All 0 but the first."""
        spoilt = torch.zeros_like(ctx.saved_tensors[0])
        spoilt.view(-1)[0] = torch.inf
        return spoilt


def _bad(batch: Batch) -> Batch:
    """Floating-point inputs become NaN, as from a damaged file; without any, targets go to other inputs."""
    floats = {
        key: torch.full_like(value, torch.nan)
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    names = [key for key in ("targets", "labels") if key in batch] if not floats else []
    if not floats and not names:
        raise ConfigError(f"--inject bad-batch: nothing to spoil in a batch of {', '.join(batch)}")
    return {**batch, **floats, **{key: batch[key].flip(-1) for key in names}}
