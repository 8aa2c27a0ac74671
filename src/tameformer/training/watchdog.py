"""A run that hangs, told: where every thread stands, in a file and in an event.

What hangs cannot be repaired from inside: a worker that waits for a lock, a file system that went away, a collective that
another process never enters. What can be done is to say where, and to end, so that whatever started the run can resume it.
"""

import faulthandler
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tameformer.training.engine import Engine

EXIT_CODE = 124
"""Of a command that was ended because it hung, as `timeout` has it."""
_WAKES = (
    10  # silent ones in a row before anything is said: a process that was stopped and goes on has missed most of them
)


class Watchdog:
    """A context that watches whether batches come to the device, in training and evaluation.

    Python code, system calls and waits for a device or another process are seen. A library that never lets go of the
    interpreter's lock is not: no thread runs beside it.

    Args:
        engine: Whose batches are the signs of life.
        folder: Gets `hang-rank0.txt`, with the stacks of all threads.
        timeout: Seconds without a batch; None watches nothing.
        tell: Told once: a sentence, and where the main thread stands.
        then: Called some seconds later; the command ends the process here.
        grace: Those seconds, in which all processes can tell where they stand before the first of them ends.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        timeout: float | None,
        tell: Callable[[str, Mapping[str, Any]], object],
        then: Callable[[], object] = lambda: None,
        grace: float = 5.0,
    ) -> None:
        self._engine, self._folder, self._timeout, self._tell = engine, folder, timeout, tell
        self._then, self._grace = then, grace
        self._over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._timeout is not None:
            # A daemon: nobody waits for it, also when it waits itself for what the main thread holds.
            threading.Thread(target=self._watch, args=(self._timeout,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self, timeout: float) -> None:
        silent, seen = 0, -1
        while not self._over.wait(timeout / _WAKES):
            silent, seen = (silent + 1 if self._engine.batches_placed == seen else 0), self._engine.batches_placed
            if silent == _WAKES:
                self._bark(timeout)
                return

    def _bark(self, timeout: float) -> None:
        # The event may have to wait for a lock that the main thread holds; the end does not.
        end = threading.Timer(self._grace, self._then)
        end.daemon = True
        end.start()
        file = self._folder / f"hang-rank{self._engine.rank}.txt"
        with file.open("w", encoding="utf-8") as opened:
            faulthandler.dump_traceback(opened, all_threads=True)
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
        last = stack[-1]
        where = f"{Path(last.filename).name}:{last.lineno}, in {last.name}"
        message = (
            f"No batch came for {timeout:g} s: the run hangs at {where}; {file.name} has the stacks of all threads. "
            f"Resume it; loop.hang_timeout is how long to wait."
        )
        self._tell(message, {"where": where, "stack": "".join(traceback.format_list(stack))})
