"""What the folder of one run of a study says: waiting, running, paused, finished, diverged, failed, or interrupted."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tameformer.errors import RecordError
from tameformer.record import LOG, RunReader, decode_number, write_atomically

State = Literal["waiting", "interrupted", "paused", "finished", "diverged", "failed"]
SETTLED: tuple[State, ...] = ("finished", "diverged", "failed")
EXIT, OUTPUT, LOCK = "exit.json", "output.txt", ".lock"
DIVERGED = 3
_TAIL = 1 << 16


@dataclass(frozen=True)
class Reading:
    """A run, as far as it has come."""

    state: State
    step: int = 0
    message: str = ""
    """Why it failed or diverged."""
    first: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """Step and value of the first telling of each measurement."""
    last: Mapping[str, float] = field(default_factory=dict)
    """Last value of each measurement."""


def state_of(folder: Path) -> tuple[State, str]:
    """How the run in a folder stands when nobody works on it, with the reason for what went wrong.

    What the process answered counts; where nobody was left to write that down, the run's own last event does.
    """
    if not (folder / LOG).is_file() and not (folder / EXIT).is_file():
        return "waiting", ""
    events = RunReader(folder).events() if (folder / LOG).is_file() else []
    if events and events[-1].get("kind") == "finish":
        return "finished", ""
    ended = read_exit(folder)
    if events and events[-1].get("kind") == "pause" and (ended is None or ended[0] == 0):
        return "paused", ""
    if ended is None:
        if events and events[-1].get("kind") == "diverged":
            return "diverged", str(events[-1].get("message", ""))
        return "interrupted", ""
    code, message = ended
    if code == 0:
        return "finished", ""
    if code == DIVERGED:
        return "diverged", message
    if code < 0 or code > 128:
        return "interrupted", message
    return "failed", message


def read_cell(folder: Path) -> Reading:
    """The run in a folder: its state and its measurements.

    Raises:
        RecordError: Its log is damaged before its last line.
    """
    state, message = state_of(folder)
    if not (folder / LOG).is_file():
        return Reading(state, message=message)
    first: dict[str, tuple[int, float]] = {}
    last: dict[str, float] = {}
    step = 0
    for line in RunReader(folder).log():
        step = int(line.pop("step"))
        for key, value in line.items():
            if isinstance(value, int | float):
                first.setdefault(key, (step, float(value)))
                last[key] = float(value)
    return Reading(state, step, message, first, last)


def position(folder: Path) -> tuple[int, float | None]:
    """Step and training loss of a run that is being written, from the end of its log."""
    step, loss = 0, None
    try:
        with open(folder / LOG, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            lines = file.read().splitlines()
    except OSError:
        return step, loss
    for line in lines:
        try:
            record = json.loads(line)
            step, loss = int(record["step"]), decode_number(record.get("train/loss", loss))
        except (ValueError, KeyError, TypeError):
            continue  # cut off by the start of the tail, or being written now
    return step, loss


def write_exit(folder: Path, code: int, message: str) -> None:
    """Keep how the process of a run ended."""
    write_atomically(folder / EXIT, json.dumps({"exit_code": code, "message": message}, ensure_ascii=False) + "\n")


def read_exit(folder: Path) -> tuple[int, str] | None:
    """Exit code and message of a run's process; None where nobody was left to write them down."""
    try:
        ended: dict[str, Any] = json.loads((folder / EXIT).read_text(encoding="utf-8"))
        return int(ended["exit_code"]), str(ended["message"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{folder / EXIT} is damaged ({error}); remove it to run this cell again") from error


def try_lock(folder: Path) -> int | None:
    """Take the folder for oneself: a file descriptor to close, or to hand to the process that works there; None if taken.

    The kernel gives the lock back when the last process that holds the descriptor is gone, however it went.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
