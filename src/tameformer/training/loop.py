"""The training loop. It builds nothing: it is handed finished objects, and tells listeners what happens."""

import math
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tameformer.errors import CheckpointError, NonFiniteError
from tameformer.readings import Readings
from tameformer.training.checkpoint import (
    CheckpointFolder,
    Snapshot,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    verify,
)
from tameformer.training.engine import Engine, evaluating
from tameformer.training.events import Listener
from tameformer.training.interval import Interval
from tameformer.training.run import Evaluation, Run
from tameformer.training.selection import Selection
from tameformer.training.signals import StopRequest
from tameformer.training.step import train_step

Status = Literal["running", "finished", "early_stopped"]


@dataclass
class Outcome:
    """How a call of the loop ended."""

    step: int
    """Steps completed."""
    status: Status
    """Still "running" when a signal interrupted the run after a save."""
    metrics: dict[str, float]
    """The last value of every metric."""


@dataclass(frozen=True)
class _Line:
    """Measurements of a step on their way to the log."""

    step: int
    epoch: float
    interval: Interval
    """The steps since the last line of the log; empty when only the inside of the model was measured."""
    readings: Readings
    rate: float
    seconds: float


class Loop:
    """One run's state while it trains.

    Args:
        run: The finished objects.
        engine: Device and processes.
        checkpoints: Where checkpoints go.
        listener: Told of everything; on other processes than the main one, too.
        stop: Asked for after every step.
    """

    def __init__(
        self, run: Run, engine: Engine, checkpoints: CheckpointFolder, listener: Listener, stop: StopRequest
    ) -> None:
        self.run, self.engine, self.checkpoints, self.listener, self.stop = run, engine, checkpoints, listener, stop
        self.step = 0
        self.status: Status = "running"
        self.interval = Interval()
        self.selection = Selection(run.checkpoint.best_metric, run.checkpoint.best_mode)
        self.metrics: dict[str, float] = {}
        self.model = engine.prepare(run.model)
        self.average: AveragedModel | None = None
        if run.ema_decay is not None:
            # Buffers are averaged, too: for Transformers they are constants.
            self.average = AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(run.ema_decay), use_buffers=True)
        self._saved_step: int | None = None
        self._lines: list[_Line] = []
        self._last_line = time.perf_counter()

    def train(self) -> Outcome:
        """Run from the present step to the end, an early stop, or a signal.

        Raises:
            NonFiniteError: The loss or the gradient became NaN or infinite; no checkpoint holds it.
        """
        run, engine, listener = self.run, self.engine, self.listener
        if self.status != "running":
            return Outcome(self.step, self.status, dict(self.metrics))
        stream = run.batches(start=self.step, stop=run.max_steps, rank=engine.rank, world_size=engine.world_size)
        listener.on_train_begin(start_step=self.step, max_steps=run.max_steps)
        if self.step == 0 and run.loop.eval_on_start and run.evaluate is not None:
            self._measure(run.evaluate, "eval")  # told, but no candidate for the best checkpoint
        self.model.train()
        self._last_line = time.perf_counter()
        with closing(cast(Any, stream)):
            for micro_batches in stream:
                logged = self._every(run.loop.logging_steps, self.step + 1)
                watch = run.watch if run.watch is not None and run.watch.due(self.step + 1) else None
                self._prepare_step()
                with nullcontext() if watch is None else watch.watching(self.step + 1):
                    result = train_step(
                        engine,
                        self.model,
                        run.optimizers,
                        micro_batches,
                        run.loss,
                        max_grad_norm=run.max_grad_norm,
                        tell_norms=None if watch is None else watch.tell_norms,
                        stop_requested=self.stop.signal_number is not None,
                    )
                self._write_lines()  # the last step's numbers have come while this one was launched
                self.step += 1
                self.interval.add(result)
                if self.average is not None:
                    self.average.update_parameters(run.model)
                if logged or watch is not None:
                    self._begin_line(logged, {} if watch is None else watch.read())
                if self._evaluation_due():
                    is_best = self._evaluate()
                    if self.step == run.max_steps:
                        self.status = "finished"
                    elif self.selection.exhausted(run.loop.early_stopping_patience):
                        self.status = "early_stopped"
                    if self.status != "running" and run.test is not None:
                        self._measure(run.test, "test")
                    every = run.checkpoint.every
                    if every is None or is_best or self.status != "running" or self._every(every, self.step):
                        self._save(best=is_best)
                    if self.status != "running":
                        self._tell_end()
                        break
                elif self._every(run.checkpoint.every, self.step):
                    self._save()
                if result.stop_requested:
                    self._save_before_stopping()
                    break
        self._write_lines()
        listener.on_train_end(self.step)
        return Outcome(self.step, self.status, dict(self.metrics))

    def _prepare_step(self) -> None:
        """Set what is random in the step, and the rates, from the step's number alone: that is all a resume needs."""
        self.engine.seed(_mix(self.run.seed, self.step, self.engine.rank))
        factor = self.run.schedule(self.step)
        for optimizer in self.run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def _every(self, steps: int | None, step: int) -> bool:
        return steps is not None and (step % steps == 0 or step == self.run.max_steps)

    def _evaluation_due(self) -> bool:
        if self.run.loop.eval_steps is not None or self.step == self.run.max_steps:
            return self._every(self.run.loop.eval_steps or 1, self.step)
        return self.run.plan.locate(self.step)[1] == 0

    def _begin_line(self, logged: bool, measured: Mapping[str, Tensor]) -> None:
        """Start moving what was measured to the host. A processor has it at once, an accelerator by the next step."""
        interval, self.interval = (self.interval, Interval()) if logged else (Interval(), self.interval)
        now = time.perf_counter()
        seconds = now - self._last_line
        if logged:
            self._last_line = now
        readings = Readings({**(interval.tensors(self.engine) if logged else {}), **measured})
        rate = max(group["lr"] for optimizer in self.run.optimizers for group in optimizer.param_groups)
        self._lines.append(_Line(self.step, self._epoch(), interval, readings, rate, seconds))
        if self.engine.device.type == "cpu":
            self._write_lines()

    def _write_lines(self) -> None:
        """Write the lines that were begun.

        Raises:
            NonFiniteError: A loss or a gradient norm is not finite.
        """
        while self._lines:
            line = self._lines.pop(0)
            numbers = line.readings.values()
            measured = {key: value for key, value in numbers.items() if key.startswith("diag/")}
            if len(line.interval):
                self._write_line(line, *line.interval.on_host(numbers), measured)
            if measured:
                self.listener.on_probe(line.step, measured)

    def _write_line(
        self, line: "_Line", losses: list[float], norms: list[float], measured: Mapping[str, float]
    ) -> None:
        run = self.run
        values = {"epoch": line.epoch, **line.interval.line(losses, norms, max_grad_norm=run.max_grad_norm)}
        self._require_finite(line.step, values, losses, norms)
        values["train/lr"] = line.rate
        if run.watch is not None:
            values |= run.watch.summary(measured)
        values[f"perf/{run.unit}_per_second"] = line.interval.num_items / line.seconds
        values["perf/step_seconds"] = line.seconds / len(line.interval)
        self.metrics |= values
        self.listener.on_log(line.step, values)

    def _require_finite(self, step: int, values: Mapping[str, float], losses: list[float], norms: list[float]) -> None:
        for offset, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                first = step - len(losses) + offset + 1
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
                message = (
                    f"step {first}: {what}; the last checkpoint before it is untouched. "
                    f"Resume from it with a lower optim.peak_lr, or look at the data of this step"
                )
                self.listener.on_log(step, values)
                self.listener.on_event(first, "non_finite", message, {"loss": loss, "grad_norm": norm})
                raise NonFiniteError(message)

    def _evaluate(self) -> bool:
        """Measure, tell, and return whether it is the best so far."""
        self._write_lines()
        if self.run.evaluate is None:
            return False
        values = self._measure(self.run.evaluate, "eval")
        return self.selection.update(self.step, values)

    def _measure(self, evaluation: Evaluation, prefix: str) -> dict[str, float]:
        started = time.perf_counter()
        model = self.run.model if self.average is None else cast(nn.Module, self.average.module)
        with evaluating(model), self.engine.autocast():
            values = {f"{prefix}/{key}": value for key, value in evaluation(self.engine, model).items()}
        self._last_line += time.perf_counter() - started  # throughput is that of training
        self.metrics |= values
        self.listener.on_evaluate(self.step, {"epoch": self._epoch(), **values})
        return values

    def _epoch(self) -> float:
        if self.step == 0:
            return 0.0
        epoch, position = self.run.plan.locate(self.step - 1)
        return epoch + (position + 1) / self.run.plan.steps_in_epoch(epoch)

    def _save(self, *, best: bool = False) -> None:
        """Publish a checkpoint, unless a value in it would not be finite; a full disk is an event, not an end."""
        started = time.perf_counter()
        self._write_lines()
        if len(self.interval):
            losses, norms = self.interval.on_host(Readings(self.interval.tensors(self.engine)).values())
            values = self.interval.line(losses, norms, max_grad_norm=self.run.max_grad_norm)
            self._require_finite(self.step, {"epoch": self._epoch(), **values}, losses, norms)
        snapshot = self.snapshot()
        self._saved_step = self.step
        if self.engine.is_main:
            try:
                self.checkpoints.save(self.step, snapshot, best=best)
            except OSError as error:
                self._saved_step = None
                self.listener.on_event(self.step, "checkpoint_failed", f"{error}; the run goes on", {})
            else:
                self.listener.on_save(self.step)
        self._last_line += time.perf_counter() - started

    def _tell_end(self) -> None:
        message = f"finished after step {self.step}"
        if self.status == "early_stopped":
            best = self.selection
            message = (
                f"stopped early after step {self.step}: {best.metric} was best at step {best.best_step} ({best.best})"
            )
        seconds = time.process_time()
        details = {"processor_seconds": seconds}
        self.listener.on_event(self.step, "finish", f"{message}; {seconds:.1f} s of processor time so far", details)

    def _save_before_stopping(self) -> None:
        """Save, unless this step is saved already, and read the checkpoint back: nobody is there to try again."""
        if self._saved_step != self.step:
            self._save()
        self.engine.wait()
        if self._saved_step == self.step:
            verify(self.checkpoints.path(self.step))
        self.listener.on_event(self.step, "stop", f"stopped by a signal after step {self.step}", {})

    def snapshot(self) -> Snapshot:
        """All that `restore` needs; every process must call it, the main one's answer is whole."""
        parts = self.engine.gather([self.interval.state()])
        return Snapshot(
            model=model_tensors(self.run.model),
            optimizer=optimizer_tensors(self.run.optimizers, self.run.model),
            average={} if self.average is None else model_tensors(self.average),
            state={
                "step": self.step,
                "status": self.status,
                "interval": parts,
                "selection": asdict(self.selection),
                "metrics": {key: value for key, value in self.metrics.items() if not key.startswith("perf/")},
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where a checkpoint was taken.

        Raises:
            CheckpointError: It does not fit the model or the optimizers.
        """
        load_model_tensors(self.run.model, snapshot.model)
        load_optimizer_tensors(self.run.optimizers, self.run.model, snapshot.optimizer)
        if self.average is not None:
            load_model_tensors(self.average, snapshot.average)
        self.step, self.status = snapshot.state["step"], snapshot.state["status"]
        if self.status == "finished" and self.step < self.run.max_steps:
            self.status = "running"  # the run was made longer
        if self.step > self.run.max_steps:
            raise CheckpointError(
                f"the checkpoint is of step {self.step}, beyond the run's end at step {self.run.max_steps}; raise max_steps"
            )
        self._saved_step = self.step
        self.selection = Selection(**snapshot.state["selection"])
        self.metrics = dict(snapshot.state["metrics"])
        self.interval.load(_share(snapshot.state["interval"], self.engine), self.engine.device)


def _share(parts: list[Mapping[str, Any]], engine: Engine) -> Mapping[str, Any]:
    """This process's part of the saved interval; with another number of processes the main one takes all losses."""
    if len(parts) == engine.world_size:
        return parts[engine.rank]
    summed = [sum(losses) for losses in zip(*(part["losses"] for part in parts), strict=True)]
    return {**parts[0], "losses": summed if engine.is_main else [0.0] * len(summed)}


def _mix(*numbers: int) -> int:
    """One seed from several numbers (the finalizer of splitmix64), so that neighbours have nothing in common.

    Example:
        >>> _mix(0, 1, 0) != _mix(1, 0, 0)
        True
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
