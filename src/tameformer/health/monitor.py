"""The probes in anyone's training loop: one line to build, one line a step."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.errors import RecordError
from tameformer.health.detectors import Detectors
from tameformer.probes import Probe, Watch, default_probes
from tameformer.readings import Readings
from tameformer.record import LOG, RunReader, RunWriter

logger = logging.getLogger(__name__)
_OF_A_STEP = "perf/step_seconds"  # in the lines that a step wrote, and in no other

Tracker = Callable[[int, Mapping[str, float]], object]
"""Told the step and the measurements of each line of the log."""


class Monitor:
    """Writes down what happens inside a model while it trains, and changes nothing about the training.

    Between measured steps nothing is on the model. The folder is a run folder: `tame report` draws it.

    Args:
        model: The model that the loop calls; compiled, distributed and sharded ones are fine.
        optimizer: What updates it, one or several; its steps end with `optimizer.step()`.
        output_dir: The run folder to write.
        every: Steps from one measurement to the next.
        probes: Probes with a cadence each; None takes `default_probes` at `every`.
        logging_steps: Steps from one line of `log.jsonl` to the next; None is `every`.
        start_step: Steps done before, when a run goes on in its folder; what was logged later is cut off.
        begins: The loop calls `begin` before each step; else a step begins where the last one ended.
        trackers: Called with the step and the measurements of each line, such as
            `tame.integrations.trackers.tracker("wandb")`.
        detectors: What is warned of, in the log and as events; None takes all at their defaults. A run that goes on is
            warned as if it had never stopped, because what its folder holds is measured up before.

    Raises:
        RecordError: The folder holds a run already, and `start_step` is 0.

    Example:
        >>> import tempfile
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with Monitor(model, optimizer, output_dir=tempfile.mkdtemp() + "/run", every=1) as monitor:
        ...     loss = model(torch.ones(2, 4)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     monitor.step(loss=loss)
        >>> sorted(path.name for path in monitor.folder.iterdir())
        ['events.jsonl', 'log.jsonl', 'probes.jsonl']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        output_dir: str | Path,
        every: int = 10,
        probes: Sequence[tuple[Probe, int]] | None = None,
        logging_steps: int | None = None,
        start_step: int = 0,
        begins: bool = False,
        trackers: Sequence[Tracker] = (),
        detectors: Detectors | None = None,
    ) -> None:
        self.folder = Path(output_dir)
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.steps_done, self.logging_steps = start_step, logging_steps or every
        self.trackers = list(trackers)
        self.detectors = Detectors() if detectors is None else detectors
        if probes is None:
            probes = [(probe, every) for probe in default_probes(model, self.optimizers)]
        self.watch = Watch(model, probes, optimizers=self.optimizers)
        self._is_main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        self._armed, self._is_armed, self._begins = ExitStack(), False, begins
        self._pending: list[tuple[int, bool, Readings, dict[str, float]]] = []
        self._on_device = next((parameter.device.type != "cpu" for parameter in model.parameters()), False)
        self._line_time, self._line_step = time.perf_counter(), start_step
        self._told_unseen = False
        self._writer: RunWriter | None = None
        if self._is_main:
            if start_step == 0 and (self.folder / LOG).exists():
                raise RecordError(
                    f"{self.folder} holds a run already; give another output_dir, or start_step= to continue it"
                )
            self._writer = RunWriter(self.folder, resume_step=start_step or None)
            kind, message = ("resume", f"resumed after step {start_step}") if start_step else ("start", "started")
            self._writer.event(start_step, kind, message)
            if start_step:
                for step, values in measurements(RunReader(self.folder)):
                    self.detectors.observe(step, values)
            if not begins:
                self.begin()

    def begin(self) -> None:
        """Say that a step begins, where `begins` is set: nothing is on the model between `step` and here."""
        if self._writer is not None and not self._is_armed and self.watch.due(self.steps_done + 1):
            self._armed.enter_context(self.watch.watching(self.steps_done + 1))
            self._is_armed = True

    def step(self, loss: Tensor | float | None = None, **metrics: Tensor | float) -> None:
        """Say that an optimizer step is done; call it after `optimizer.step()`.

        Args:
            loss: The loss of the step, logged as `train/loss`; nothing waits for a tensor on an accelerator.
            metrics: Anything else to log, by its name: `grad_norm=...` becomes `train/grad_norm`.
        """
        if self._writer is None:
            return
        self._write_lines()
        was_armed = self._is_armed
        self._disarm()
        self.steps_done += 1
        logged = self.steps_done % self.logging_steps == 0
        measured = self.watch.read() if was_armed else {}
        if logged or measured:
            self._begin_line(logged, measured, {"loss": loss, **metrics})
        if was_armed and not self._told_unseen:
            self._tell_unseen()
        if not self._begins:
            self.begin()

    def log(self, **metrics: float) -> None:
        """Log what is known of the training only after `step`, by its name: `loss=0.3` becomes `train/loss`."""
        self._log("train", metrics)

    def evaluate(self, **metrics: float) -> None:
        """Log metrics on held-out data, by their names: `loss=0.3` becomes `eval/loss`."""
        self._log("eval", metrics)

    def detach(self) -> None:
        """Take everything off the model and the optimizer; the monitor stays usable for `evaluate` and `close`."""
        self._disarm()

    def close(self) -> None:
        """Detach, write what is left, and close the files."""
        self._disarm()
        if self._writer is not None:
            self._write_lines()
            self._writer.event(self.steps_done, "finish", f"finished after step {self.steps_done}")
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and self._writer is not None:
            self._disarm()
            self._write_lines()
            self._writer.event(
                self.steps_done, "stop", f"stopped after step {self.steps_done}: {kind and kind.__name__}"
            )
            self._writer.close()
            self._writer = None
        self.close()

    def _disarm(self) -> None:
        self._is_armed = False
        self._armed.close()

    def _begin_line(
        self, logged: bool, measured: Mapping[str, Tensor], metrics: Mapping[str, Tensor | float | None]
    ) -> None:
        tensors = {
            f"train/{name}": value.detach().reshape(()) for name, value in metrics.items() if isinstance(value, Tensor)
        }
        numbers = {f"train/{name}": float(value) for name, value in metrics.items() if isinstance(value, (int, float))}
        numbers.setdefault(
            "train/lr", max(float(group["lr"]) for each in self.optimizers for group in each.param_groups)
        )
        if logged:
            now = time.perf_counter()
            numbers["perf/step_seconds"] = (now - self._line_time) / (self.steps_done - self._line_step)
            self._line_time, self._line_step = now, self.steps_done
        self._pending.append((self.steps_done, logged, Readings({**(tensors if logged else {}), **measured}), numbers))
        if not self._on_device:
            self._write_lines()

    def _write_lines(self) -> None:
        assert self._writer is not None
        while self._pending:
            step, logged, readings, numbers = self._pending.pop(0)
            values = readings.values()
            measured = {key: value for key, value in values.items() if key.startswith("diag/")}
            if measured:
                self._writer.probe(step, measured)
            line: dict[str, float] = {}
            if logged:
                line = {key: value for key, value in values.items() if key not in measured}
                line |= {**self.watch.summary(measured), **numbers}
                self._writer.log(step, line)
                self._track(step, line)
            self._judge(step, {**line, **measured})

    def _log(self, group: str, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            values = {f"{group}/{name}": float(value) for name, value in metrics.items()}
            self._writer.log(self.steps_done, values)
            self._track(self.steps_done, values)
            self._judge(self.steps_done, values)

    def _judge(self, step: int, values: Mapping[str, float]) -> None:
        """Tell what the detectors make of the measurements."""
        assert self._writer is not None
        for verdict in self.detectors.observe(step, values):
            self._writer.event(step, "verdict", str(verdict), **verdict.details)
            logger.warning("step %d: %s", step, verdict)

    def _track(self, step: int, values: Mapping[str, float]) -> None:
        for tracker in self.trackers:
            tracker(step, values)

    def _tell_unseen(self) -> None:
        assert self._writer is not None
        self._told_unseen = True
        unseen = self.watch.unseen()
        if unseen:
            message = f"not measured: {'; '.join(unseen)}"
            self._writer.event(self.steps_done, "unseen", message)
            logger.warning(message)


def measurements(reader: RunReader) -> Iterator[tuple[int, dict[str, float]]]:
    """What a monitor has written, in the order and the parts in which its detectors were told of it."""
    probes = [(int(line.pop("step")), line) for line in reader.probes()]
    for line in reader.log():
        step = int(line.pop("step"))
        while probes and probes[0][0] < step:
            yield probes.pop(0)
        measured = probes.pop(0)[1] if _OF_A_STEP in line and probes and probes[0][0] == step else {}
        yield step, {**line, **measured}
    yield from probes
