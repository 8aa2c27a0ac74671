"""What becomes of measurements: they move to the host, are written as a line of the log, and the detectors judge them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from tameformer.readings import Readings
from tameformer.training.events import Listener
from tameformer.training.interval import Interval
from tameformer.training.progress import Progress
from tameformer.training.run import Run, epochs


@dataclass(frozen=True)
class _Line:
    """Measurements of a step on their way to the log."""

    step: int
    epoch: float
    interval: Interval | None
    """The steps since the last line of the log; None when only the inside of the model was measured."""
    readings: Readings
    rate: float
    seconds: float
    waited: float
    """Of these, those without anything to do because the data were not there."""


class Log:
    """The lines of one run's log, and the clock that its throughput is read from.

    Args:
        run: Whose measurements they are.
        progress: Where it stands.
        listener: Told of every line, and of what the detectors make of it.
        at_once: Whether numbers are on the host as soon as they are there; else a line is written one step later.
    """

    def __init__(self, run: Run, progress: Progress, listener: Listener, *, at_once: bool) -> None:
        self.run, self.progress, self.listener, self.at_once = run, progress, listener, at_once
        self._begun: list[_Line] = []
        self._told: set[str] = set()
        self.start_clock()

    def start_clock(self) -> None:
        """Count the seconds of training, and those spent waiting for data, from now on."""
        self._started, self._waited = time.perf_counter(), 0.0

    def add_wait(self, seconds: float) -> None:
        """Nothing could be done for so long, because the data were not there."""
        self._waited += seconds

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What runs inside is not training: throughput is that of training."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def begin_line(self, measured: Mapping[str, Tensor], *, ends_interval: bool) -> None:
        """Start moving what was measured to the host. A processor has it at once, an accelerator by the next step."""
        progress, interval = self.progress, None
        now = time.perf_counter()
        seconds, waited = now - self._started, self._waited
        if ends_interval:
            interval, progress.interval = progress.interval, Interval()
            self._started, self._waited = now, 0.0
        rate = max(group["lr"] for optimizer in self.run.optimizers for group in optimizer.param_groups)
        epoch = epochs(self.run.plan, progress.position)
        self._begun.append(_Line(progress.step, epoch, interval, Readings(measured), rate, seconds, waited))
        if self.at_once:
            self.write()

    def write(self) -> None:
        """Write the lines that were begun, and have them judged."""
        while self._begun:
            line = self._begun.pop(0)
            measured = line.readings.values()
            logged = {} if line.interval is None else self._write_line(line, line.interval, measured)
            if measured:
                self.listener.on_probe(line.step, measured)
            self._judge(line.step, {"train/lr": line.rate, **logged, **measured})

    def tell_unseen(self, unseen: Sequence[str]) -> None:
        """Say what could not be measured, each once: the event has all names, its message the first few of each reason."""
        new = [text for text in unseen if text not in self._told]
        if not new:
            return
        self._told.update(new)
        by_reason: dict[str, list[str]] = {}
        for text in new:
            name, _, reason = text.partition(": ")
            by_reason.setdefault(reason, []).append(name)
        told = "; ".join(f"{_first_few(names)}: {reason}" for reason, names in by_reason.items())
        self.listener.on_event(self.progress.step, "unseen", f"not measured: {told}", {"unseen": new})

    def forget(self) -> None:
        """Write none of the lines that were begun: the run went back to before them."""
        self._begun = []

    def write_evaluation(self, values: Mapping[str, float], *, judged: bool) -> None:
        """Tell what was measured on held-out data after the present step."""
        progress = self.progress
        progress.metrics |= values
        self.listener.on_evaluate(progress.step, {"epoch": epochs(self.run.plan, progress.position), **values})
        if judged:
            self._judge(progress.step, values)

    def _write_line(self, line: _Line, interval: Interval, measured: Mapping[str, float]) -> dict[str, float]:
        run = self.run
        values = {"epoch": line.epoch, **interval.line(), "train/lr": line.rate}
        if run.watch is not None:
            values |= run.watch.summary(measured)
        if len(interval):
            values[f"perf/{run.unit}_per_second"] = interval.num_items / line.seconds
            values["perf/step_seconds"] = line.seconds / (len(interval) + interval.num_skipped)
            values["perf/data_wait"] = line.waited / line.seconds
        self.progress.metrics |= values
        self.listener.on_log(line.step, values)
        return values

    def _judge(self, step: int, values: Mapping[str, float]) -> None:
        """Tell what the detectors make of a step's measurements."""
        for verdict in self.run.detectors.observe(step, values) if self.run.detectors is not None else ():
            self.listener.on_event(step, "verdict", str(verdict), verdict.details)


def _first_few(names: Sequence[str], few: int = 4) -> str:
    more = len(names) - few
    return ", ".join(names[:few]) + (f" and {more} more" if more > 0 else "")
