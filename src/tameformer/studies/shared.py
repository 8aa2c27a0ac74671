"""A comparison spread over machines: the cells are trials in a database that Optuna keeps, taken by whoever is free.

What has been run is what the folders say, on a disk that all machines share; the database only says who works on what. A
worker that dies stops sending signs of life, and its cell is offered again.
"""

import hashlib
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tameformer.errors import ConfigError, missing_extra
from tameformer.studies.cells import SETTLED, State, read_cell, read_exit, state_of, try_lock
from tameformer.studies.grid import Cell
from tameformer.studies.results import LOSS
from tameformer.studies.workers import FolderQueue, Queue

CELL, CRASHED = "cell", "crashed"
MAX_CRASHES = 3
SECONDS_BETWEEN_OFFERS = 2.0


class StorageQueue:
    """Cells shared by all commands that name the same storage and work in the same folder.

    Args:
        storage: Where the database is, such as `sqlite:////shared/study.db` or `postgresql://user@host/study`.
        study: Name of the comparison in the database.
        folder: The comparison's folder.
        cells: All cells.
        ends: States in which a cell is done.
        heartbeat_seconds: Time between two signs of life.
        grace_seconds: Time without one after which a worker counts as dead.

    Raises:
        ImportError: Optuna, or the driver of the database, is not installed.
        ConfigError: The database cannot be opened.
    """

    def __init__(
        self,
        storage: str,
        study: str,
        folder: Path,
        cells: Sequence[Cell],
        *,
        ends: Sequence[State] = SETTLED,
        heartbeat_seconds: int = 15,
        grace_seconds: int = 90,
    ) -> None:
        try:
            import optuna
        except ImportError as error:
            raise missing_extra("optuna", "sweep") from error
        self._optuna, self._states = optuna, optuna.trial.TrialState
        self.folder, self._cells, self._ends = folder, {cell.name: cell for cell in cells}, ends
        self.heartbeat_seconds = heartbeat_seconds
        self._trials: dict[str, Any] = {}
        self._settled: set[str] = set()
        self._given_up: set[str] = set()
        self._beaten = self._offered = self._found_nothing = -math.inf
        try:
            self._storage, self._study = self._open(storage, study, heartbeat_seconds, grace_seconds)
        except ImportError:
            raise  # names the driver that SQLAlchemy would need
        except Exception as error:  # whatever the database's driver raises; the address may hold a password
            raise ConfigError(
                f"the storage cannot be opened ({type(error).__name__}); expected an address such as "
                f"sqlite:////shared/study.db or postgresql://user@host/study, with the database running"
            ) from error

    def _open(self, storage: str, study: str, heartbeat_seconds: int, grace_seconds: int, attempts: int = 5) -> Any:
        """The storage and the study in it. Of workers that make the tables at the same moment all but one must try again."""
        from sqlalchemy.exc import DBAPIError

        # A database file is locked while anyone writes: wait, rather than fail.
        waiting = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {}
        try:
            with self._without_warnings():
                opened = self._optuna.storages.RDBStorage(
                    storage, engine_kwargs=waiting, heartbeat_interval=heartbeat_seconds, grace_period=grace_seconds
                )
            return opened, self._optuna.create_study(storage=opened, study_name=study, load_if_exists=True)
        except DBAPIError:
            if attempts <= 1:
                raise
            time.sleep(0.5)
            return self._open(storage, study, heartbeat_seconds, grace_seconds, attempts - 1)

    def take(self) -> tuple[Cell, int] | None:
        """The next cell that no worker has, here or elsewhere."""
        if time.monotonic() - self._found_nothing < SECONDS_BETWEEN_OFFERS:
            return None  # the database need not be asked ten times a second
        self._offer_what_nobody_has()
        while self._study.get_trials(deepcopy=False, states=(self._states.WAITING,)):
            with self._without_warnings():
                trial = self._study.ask()
            cell = self._cells.get(trial.user_attrs.get(CELL, ""))
            if cell is None:  # the last one was taken since we looked, and Optuna made up another
                self._study.tell(trial, state=self._states.PRUNED)
                return None
            self._storage.record_heartbeat(trial._trial_id)
            lock = None if self._another_has(cell, trial.number) else try_lock(self.folder / cell.name)
            if lock is not None and state_of(self.folder / cell.name)[0] not in self._ends:
                self._trials[cell.name] = trial
                return cell, lock
            if lock is not None:
                os.close(lock)
            self._study.tell(trial, state=self._states.PRUNED)
        self._found_nothing = time.monotonic()
        return None

    def settle(self, cell: Cell, state: State) -> None:
        """Tell the others how the cell ended; an interrupted one goes back to them."""
        trial = self._trials.pop(cell.name)
        ended = read_exit(self.folder / cell.name)
        if state == "interrupted" and ended is not None and ended[0] < 0:
            trial.set_user_attr(CRASHED, True)  # such as one that needs more memory than there is
        if state in ("finished", "paused"):
            loss = read_cell(self.folder / cell.name).last.get(LOSS, 0.0)
            self._study.tell(trial, loss, skip_if_finished=True)
        else:
            self._study.tell(trial, state=self._states.FAIL, skip_if_finished=True)

    def beat(self, running: Sequence[Cell]) -> None:
        """Send the signs of life that are due."""
        now = time.monotonic()
        if now - self._beaten >= self.heartbeat_seconds:
            self._beaten = now
            for cell in running:
                self._storage.record_heartbeat(self._trials[cell.name]._trial_id)

    @property
    def is_done(self) -> bool:
        """Every cell has ended, wherever it ran, or has crashed too often."""
        for name in self._cells.keys() - self._settled:
            if state_of(self.folder / name)[0] in self._ends:
                self._settled.add(name)
        return self._cells.keys() <= self._settled | self._given_up

    def _offer_what_nobody_has(self) -> None:
        """Queue the cells that are neither done, nor queued, nor in the hands of a worker that lives.

        Two workers may queue the same cell at once; whoever takes it second sees that, in `_another_has`.
        """
        if time.monotonic() - self._offered < SECONDS_BETWEEN_OFFERS or self.is_done:
            return
        self._offered = time.monotonic()
        with self._without_warnings():
            self._optuna.storages.fail_stale_trials(self._study)
        trials = self._study.get_trials(deepcopy=False)
        spoken_for = {
            trial.user_attrs.get(CELL)
            for trial in trials
            if trial.state in (self._states.WAITING, self._states.RUNNING)
        }
        crashes = [trial.user_attrs.get(CELL) for trial in trials if trial.user_attrs.get(CRASHED)]
        for name in self._cells:
            if name in self._settled or name in spoken_for:
                continue
            if crashes.count(name) >= MAX_CRASHES:
                self._given_up.add(name)
            elif (lock := try_lock(self.folder / name)) is not None:  # else a run has outlived its worker so far
                os.close(lock)
                self._study.enqueue_trial({}, user_attrs={CELL: name})

    @contextmanager
    def _without_warnings(self) -> Iterator[None]:
        """Optuna has called its heartbeat experimental since version 2.9, and expects `optimize` to send it, not us."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=self._optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used with")
            yield

    def _another_has(self, cell: Cell, number: int) -> bool:
        """Whether a worker took an earlier trial of the same cell and still has it."""
        running = self._study.get_trials(deepcopy=False, states=(self._states.RUNNING,))
        return any(trial.user_attrs.get(CELL) == cell.name and trial.number < number for trial in running)


def open_queue(
    storage: str | None, folder: Path, key: str, cells: Sequence[Cell], *, ends: Sequence[State] = SETTLED
) -> Queue:
    """Who works on what: kept apart by locks on this machine, or through a database by workers anywhere.

    Args:
        storage: Where the database is; None for locks.
        folder: The study's folder.
        key: What tells this study from every other one.
        cells: All cells.
        ends: States in which a cell is done.
    """
    if storage is None:
        return FolderQueue(folder, cells, ends=ends)
    return StorageQueue(storage, study_name(folder, key, cells), folder, cells, ends=ends)


def study_name(folder: Path, key: str, cells: Sequence[Cell]) -> str:
    """The comparison's name in a database: readable, its own, and another one when the grid has grown."""
    digest = hashlib.sha256("\n".join([key, *(cell.name for cell in cells)]).encode()).hexdigest()
    return f"{folder.resolve().name}-{digest[:12]}"
