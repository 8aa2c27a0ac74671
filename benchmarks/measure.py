"""Fair comparison of training loops on a machine that others use, too.

Every loop runs in a thread of its own and is let go for a few steps at a time, one loop after the other, in a new random
order each round. Ratios are taken inside a round, so that what slows the machine for a while slows both sides.
"""

import contextlib
import json
import multiprocessing
import random
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

StepBegins = Callable[[], bool]
"""Called by a loop before each step; waits until the step may run, and says False when the loop shall end."""
TrainingLoop = Callable[[StepBegins], object]
"""Runs steps for as long as it is let."""


@dataclass(frozen=True)
class Quartiles:
    """A sample's middle half."""

    median: float
    low: float
    high: float

    def show(self, digits: int = 3) -> str:
        """As `median [low-high]`."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}-{self.high:.{digits}f}]"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Median and quartiles, linear between neighbours.

    Example:
        >>> quartiles([4.0, 1.0, 2.0, 3.0, 5.0])
        Quartiles(median=3.0, low=2.0, high=4.0)
    """
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    return Quartiles(at(0.5), at(0.25), at(0.75))


class Paused:
    """A loop in its own thread that stands still until it is let go for a number of steps.

    A chunk lasts from one call of `step_begins` to the one `steps` later: all that the loop does per step is inside,
    wherever in its step it makes the call. The first call is reached, and thrown away, before anything is timed.
    """

    def __init__(self, loop: TrainingLoop) -> None:
        self._loop = loop
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._left = 0
        self._ending = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()  # at the first step

    def advance(self, steps: int) -> tuple[float, float]:
        """Run some steps; returns the processor's and the wall clock's seconds."""
        self._left = steps
        wall, processor = time.perf_counter(), time.process_time()
        self._go.release()
        self._done.acquire()
        seconds = time.process_time() - processor, time.perf_counter() - wall
        self._raise()
        return seconds

    def close(self) -> None:
        """Let the loop end as it does at the end of its data."""
        self._ending = True
        self._go.release()
        self._thread.join()
        self._raise()

    def _step_begins(self) -> bool:
        if self._left == 0:
            self._done.release()
            self._go.acquire()
        self._left -= 1
        return not self._ending

    def _run(self) -> None:
        try:
            self._loop(self._step_begins)
        except BaseException as error:
            self._error = error
        self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
        if not self._thread.is_alive() and not self._ending:
            raise RuntimeError("the loop ended before it was told to; give it more steps")


class Elsewhere:
    """A paused loop in a forked process of its own: for loops with several threads.

    OpenMP keeps threads for each thread that asks for some. Where loops in one process have more of them together than there
    are cores, none waits actively any more, and every operation of every loop pays for waking its helpers. Start it before
    anything ran on several threads: a fork does not take those along.

    Args:
        loop: What is let go.
        told: Asked when the loop has ended; what it returns there is what `close` returns here.
    """

    def __init__(self, loop: TrainingLoop, told: Callable[[], object]) -> None:
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(theirs, loop, told), daemon=True)
        self._process.start()

    def advance(self, steps: int) -> tuple[float, float]:
        """Run some steps; returns the processor's and the wall clock's seconds."""
        self._ours.send(steps)
        return self._ours.recv()

    def close(self) -> Any:
        """Let the loop end; returns what it tells."""
        self._ours.send(0)
        told = self._ours.recv()
        self._process.join()
        return told

    @staticmethod
    def _serve(pipe: Any, loop: TrainingLoop, told: Callable[[], object]) -> None:
        paused = Paused(loop)
        while steps := pipe.recv():
            pipe.send(paused.advance(steps))
        paused.close()
        pipe.send(told())


Timings = Mapping[str, list[tuple[float, float]]]
"""By variant, for each round, the processor's and the wall clock's seconds of one step."""


Hooks = tuple[Callable[[], object], Callable[[], object]]


def interleaved(
    loops: Mapping[str, TrainingLoop | Elsewhere],
    *,
    rounds: int,
    steps: int,
    warmup: int,
    seed: int = 0,
    around: Callable[[str], Hooks] = lambda name: (lambda: None, lambda: None),
) -> Timings:
    """Time a step of every loop in turns.

    Args:
        loops: By name; or started already, `Elsewhere`.
        rounds: How often each loop has its turn.
        steps: Steps in a turn.
        warmup: Steps before the first timed turn.
        seed: Of the order within the rounds.
        around: From a loop's name to what is called before and after each of its turns, outside the clock.
    """
    order = random.Random(seed)
    paused: dict[str, Paused | Elsewhere] = {}
    try:
        for name, loop in loops.items():
            paused[name] = loop if isinstance(loop, Elsewhere) else Paused(loop)
            paused[name].advance(warmup)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
        for _ in range(rounds):
            for name in order.sample(sorted(paused), len(paused)):
                before, after = around(name)
                before()
                processor, wall = paused[name].advance(steps)
                after()
                seconds[name].append((processor / steps, wall / steps))
    finally:
        for loop in paused.values():
            if isinstance(loop, Paused):
                loop.close()
    return seconds


def in_turns(calls: Mapping[str, Callable[[], object]], *, rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Seconds, by `now`, of each call in each round, in a new random order every time; two calls before are not counted."""
    order = random.Random(seed)
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(sorted(calls), len(calls)):
            begin = now()
            calls[name]()
            seconds[name].append(now() - begin)
    return seconds


def device() -> torch.device:
    """Where models are measured: the accelerator, where there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def now() -> float:
    """Seconds of this process; where there is an accelerator, the wall clock's when it has done all that it was given."""
    if not torch.accelerator.is_available():
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Adds up the seconds spent inside some methods of an object.

    Args:
        holder: Whose methods.
        names: Of the methods.
        clock: Seconds; the processor's of this process.
    """

    def __init__(self, holder: object, names: Sequence[str], *, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds, self._clock = 0.0, clock
        for name in names:
            setattr(holder, name, self._timed(getattr(holder, name)))

    def _timed(self, call: Callable) -> Callable:
        def timed(*args):
            begin = self._clock()
            try:
                return call(*args)
            finally:
                self.seconds += self._clock() - begin

        return timed


def growth(run: Callable[[], object]) -> float:
    """MiB by which memory grew at its highest while something ran: the accelerator's, or that of this process."""
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        return (torch.accelerator.max_memory_allocated() - before) / 2**20
    forget_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def clock(timings: Timings, *, threads: int) -> dict[str, list[float]]:
    """Seconds by variant: the processor's with one thread (a preempted process does not age), else the wall clock's."""
    return {name: [pair[0 if threads == 1 else 1] for pair in pairs] for name, pairs in timings.items()}


def ratio(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> Quartiles:
    """One variant's time over another's, round by round."""
    return quartiles([ours / theirs for ours, theirs in zip(seconds[name], seconds[to], strict=True)])


def difference_ms(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> Quartiles:
    """One variant's time minus another's, round by round, in milliseconds."""
    return quartiles([1e3 * (ours - theirs) for ours, theirs in zip(seconds[name], seconds[to], strict=True)])


def told_by(command: Sequence[str], mark: str) -> Any:
    """Run a command; what it wrote as JSON after the mark, at the end of what it said.

    Raises:
        RuntimeError: The command failed; the message holds the end of what it said about that.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.rpartition(f"{mark} ")[2])


def resident(field: str) -> float:
    """MiB of this process in Linux: `VmRSS` now, `VmHWM` at its peak."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "Linux has both fields"
    return int(found[1]) / 1024


def forget_peak() -> None:
    """Set the mark of `VmHWM` back to now; where the kernel refuses, the peak holds what was taken before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
