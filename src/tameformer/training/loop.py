"""The training loop. It builds nothing: it is handed finished objects, and tells listeners what happens."""

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tameformer.errors import CheckpointError, NonFiniteError
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
        self.model.train()
        self._last_line = time.perf_counter()
        with closing(cast(Any, stream)):
            for micro_batches in stream:
                watched = self._every(run.loop.logging_steps, self.step + 1)
                self._prepare_step()
                with ExitStack() as watching:
                    for probe in run.probes if watched else ():
                        watching.enter_context(probe.watching())
                    result = train_step(
                        engine,
                        self.model,
                        run.optimizers,
                        micro_batches,
                        run.loss,
                        max_grad_norm=run.max_grad_norm,
                        stop_requested=self.stop.signal_number is not None,
                    )
                self.step += 1
                self.interval.add(result)
                if self.average is not None:
                    self.average.update_parameters(run.model)
                if watched:
                    self._write_line()
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

    def _write_line(self) -> None:
        """Write what was measured since the last line, and begin a new interval."""
        losses, norms = self._finite_interval()
        now = time.perf_counter()
        seconds, self._last_line = now - self._last_line, now
        steps = len(self.interval)
        values = {"epoch": self._epoch(), **self.interval.line(losses, norms, max_grad_norm=self.run.max_grad_norm)}
        values["train/lr"] = max(group["lr"] for optimizer in self.run.optimizers for group in optimizer.param_groups)
        measured = self._read_probes()
        for probe in self.run.probes:
            values |= probe.summary(measured)
        values[f"perf/{self.run.unit}_per_second"] = self.interval.num_items / seconds
        values["perf/step_seconds"] = seconds / steps
        self.interval.clear()
        self.metrics |= values
        self.listener.on_log(self.step, values)
        if measured:
            self.listener.on_probe(self.step, measured)

    def _read_probes(self) -> dict[str, float]:
        """All probes' values by key; vectors get the number of the head behind their key. One transfer for all."""
        tensors = {key: tensor for probe in self.run.probes for key, tensor in probe.read().items()}
        if not tensors:
            return {}
        numbers = iter(torch.cat([tensor.float() for tensor in tensors.values()]).tolist())
        values: dict[str, float] = {}
        for key, tensor in tensors.items():
            if len(tensor) == 1 and key.rpartition("/")[0].endswith("_max"):
                values[key] = next(numbers)
            else:
                values |= {f"{key}/{head}": next(numbers) for head in range(len(tensor))}
        return values

    def _finite_interval(self) -> tuple[list[float], list[float]]:
        """The interval's losses and norms.

        Raises:
            NonFiniteError: One of them is not finite; the first is named.
        """
        losses, norms = self.interval.read(self.engine)
        for offset, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                step = self.step - len(losses) + offset + 1
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm}"
                message = (
                    f"step {step}: {what}; the last checkpoint before it is untouched. "
                    f"Resume from it with a lower optim.peak_lr, or look at the data of this step"
                )
                line = self.interval.line(losses, norms, max_grad_norm=self.run.max_grad_norm)
                self.listener.on_log(self.step, {"epoch": self._epoch(), **line})
                self.listener.on_event(step, "non_finite", message, {"loss": loss, "grad_norm": norm})
                raise NonFiniteError(message)
        return losses, norms

    def _evaluate(self) -> bool:
        """Measure, tell, and return whether it is the best so far."""
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
        self._finite_interval()
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
