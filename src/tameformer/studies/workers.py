"""Several runs at a time, each a process of its own that ends with this one."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from tameformer.studies.cells import EXIT, OUTPUT, SETTLED, State, state_of, try_lock, write_exit
from tameformer.studies.grid import Cell

logger = logging.getLogger(__name__)
SECONDS_BETWEEN_LOOKS = 0.1
_ERROR_TAIL = 1 << 14


@dataclass
class Running:
    """A run in progress."""

    cell: Cell
    folder: Path
    process: subprocess.Popen[bytes]
    slot: int
    started: float


@runtime_checkable
class Queue(Protocol):
    """Who works on what."""

    def take(self) -> tuple[Cell, int] | None:
        """A cell that is this process's alone from now on, and its lock; None if there is none at present."""
        ...

    def settle(self, cell: Cell, state: State) -> None:
        """The cell taken is done, or given back when interrupted."""
        ...

    def beat(self, running: Sequence[Cell]) -> None:
        """This process is alive and works on these."""
        ...

    @property
    def is_done(self) -> bool:
        """Nothing is left, here or elsewhere, that `take` could still give."""
        ...


class FolderQueue:
    """The cells of a folder, kept apart by locks: several commands on one machine share the work.

    Args:
        folder: The comparison's folder.
        cells: All cells.
        ends: States in which a cell is done.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell], *, ends: Sequence[State] = SETTLED) -> None:
        self.folder, self._ends = folder, ends
        self._open = {cell.name: cell for cell in cells if state_of(folder / cell.name)[0] not in ends}

    def take(self) -> tuple[Cell, int] | None:
        """The next cell that nobody works on."""
        for name, cell in list(self._open.items()):
            lock = try_lock(self.folder / name)
            if lock is None:
                continue
            del self._open[name]
            if state_of(self.folder / name)[0] not in self._ends:
                return cell, lock
            os.close(lock)  # another command has finished it meanwhile
        return None

    def settle(self, cell: Cell, state: State) -> None:
        """A cell that was interrupted is not tried again by this command."""

    def beat(self, running: Sequence[Cell]) -> None:
        """A lock needs no sign of life."""

    @property
    def is_done(self) -> bool:
        """Every cell has been taken here or finished elsewhere."""
        return not self._open


def work(
    queue: Queue,
    folder: Path,
    command: Callable[[Cell], Sequence[str]],
    slots: Sequence[Mapping[str, str]],
    *,
    stop_requested: Callable[[], bool],
    on_change: Callable[[Sequence[Running]], None],
) -> None:
    """Run what the queue gives, one cell a slot, until nothing is left or a stop is requested.

    Args:
        queue: Where cells come from.
        folder: The comparison's folder.
        command: From a cell to the command of its run.
        slots: Environment variables of each place to run in.
        stop_requested: Asked all the time; then the runs are asked to save and stop, and waited for.
        on_change: Told several times a second what is running.
    """
    running: list[Running] = []
    told_to_stop = False
    try:
        while True:
            for run in [run for run in running if run.process.poll() is not None]:
                running.remove(run)
                queue.settle(run.cell, _conclude(run))
            if stop_requested() and not told_to_stop:
                told_to_stop = True
                for run in running:
                    run.process.terminate()
            while not told_to_stop and len(running) < len(slots) and (taken := queue.take()) is not None:
                slot = min(set(range(len(slots))) - {run.slot for run in running})
                running.append(_start(*taken, folder, command, slot, slots[slot]))
            queue.beat([run.cell for run in running])
            on_change(running)
            if not running and (told_to_stop or queue.is_done):
                return
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:  # after an error here, too, no run is left behind
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()
            queue.settle(run.cell, _conclude(run))


def _start(
    cell: Cell, lock: int, folder: Path, command: Callable[[Cell], Sequence[str]], slot: int, extra: Mapping[str, str]
) -> Running:
    place = folder / cell.name
    (place / EXIT).unlink(missing_ok=True)
    try:
        with open(place / OUTPUT, "wb") as output:
            process = subprocess.Popen(
                command(cell),
                stdin=subprocess.PIPE,  # closes with this process, and the run stops: see tameformer.cli.cell
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **extra},
                pass_fds=(lock,),  # the lock lives as long as the run
                start_new_session=True,  # Ctrl-C in the terminal is this process's to pass on, once
            )
    finally:
        os.close(lock)
    return Running(cell, place, process, slot, time.monotonic())


def _conclude(run: Running) -> State:
    """Write down how a process ended; returns the cell's state."""
    if run.process.stdin is not None:
        run.process.stdin.close()
    code = run.process.returncode
    last_line = _last_line(run.folder / OUTPUT).removeprefix("tame train: ")
    if code > 128:
        last_line = "stopped by a signal after a save"
    elif code < 0:
        name = signal.Signals(-code).name
        last_line = f"ended by {name}" + ("; out of memory?" if code == -signal.SIGKILL else "")
    write_exit(run.folder, code, "" if code == 0 else last_line)
    state, message = state_of(run.folder)
    if state not in ("finished", "paused"):
        logger.info("%s: %s, exit code %d: %s", run.cell.name, state, code, message.partition(";")[0])
    return state


def _last_line(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _ERROR_TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def train_command(recipe: str, arguments: Sequence[str]) -> Callable[[Path, Cell], list[str]]:
    """From a cell's folder and the cell to the command of its run."""

    def command(folder: Path, cell: Cell) -> list[str]:
        return [
            sys.executable, "-m", "tameformer.cli.cell", recipe, *arguments, *cell.arguments,
            "--loop.eval_on_start=true", f"--output_dir={folder / cell.name}", "--resume=auto",
        ]  # fmt: skip

    return command


def usable_cores() -> int:
    """Processor cores that this process may use: its affinity and, in a container, its share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit, or none set
        return cores


def places(jobs: int | None, *, num_gpus: int) -> list[dict[str, str]]:
    """Environment variables of each place to run in: a GPU each, or one thread each; more jobs than GPUs share them.

    A number of threads that the environment sets already stays, and the default number of jobs goes by it.

    Example:
        >>> places(3, num_gpus=2)[2]["CUDA_VISIBLE_DEVICES"], len(places(None, num_gpus=2))
        ('0', 2)
    """
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "OMP_WAIT_POLICY": "passive"}
    if not num_gpus:
        given = threads["OMP_NUM_THREADS"]
        count = jobs or max(1, usable_cores() // (int(given) if given.isdigit() and int(given) else 1))
        return [threads] * count
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) >= num_gpus and visible[0] else [str(index) for index in range(num_gpus)]
    return [{"CUDA_VISIBLE_DEVICES": names[index % num_gpus].strip()} for index in range(jobs or num_gpus)]
