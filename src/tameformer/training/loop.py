"""The training loop. It builds nothing: it is handed finished objects, and tells listeners what happens."""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tameformer.errors import CheckpointError, DivergedError
from tameformer.readings import Readings
from tameformer.training.checkpoint import (
    CheckpointFolder,
    Snapshot,
    load,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    verify,
)
from tameformer.training.engine import Engine, evaluating
from tameformer.training.events import Listener
from tameformer.training.interval import Interval
from tameformer.training.recovery import Answer, anchors_to_keep, first_not_finite, rollback_target
from tameformer.training.run import Evaluation, Run, Watch
from tameformer.training.selection import Selection
from tameformer.training.signals import StopRequest
from tameformer.training.step import Batch, StepResult, train_step

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
    interval: Interval | None
    """The steps since the last line of the log; None when only the inside of the model was measured."""
    readings: Readings
    rate: float
    seconds: float
    waited: float
    """Of these, those without anything to do because the data were not there."""


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are on their way to the host: an accelerator has them while it runs the next one."""

    step: int
    interval: Interval
    result: StepResult
    readings: Readings


_NOTHING = (float("-inf"), float("-inf"))  # the limits of a step that must not be taken


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
        self.skipped = 0
        """Of these steps, those that were not taken: the schedule stands still for them, the data do not."""
        self.passed_over = 0
        """Batches of the plan that were given up by going back: the data go on where they were."""
        self.anchors: list[int] = []
        """Checkpoints that the schedule made and that are kept."""
        self.parts = 1
        """Pieces that each micro-batch is cut into: twice as many whenever memory has run out."""
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
        self._pending: _Pending | None = None
        self._answer: Answer | None = None
        self._details: dict[str, Any] = {}
        self._last_line, self._waited = time.perf_counter(), 0.0

    def train(self) -> Outcome:
        """Run from the present step to the end, an early stop, or a signal.

        Raises:
            DivergedError: The guard could not bring the run back; its checkpoints are sound.
        """
        run, listener = self.run, self.listener
        if self.status != "running":
            return Outcome(self.step, self.status, dict(self.metrics))
        listener.on_train_begin(start_step=self.step, max_steps=run.max_steps)
        if self.step == 0 and run.loop.eval_on_start and run.evaluate is not None:
            self._measure(run.evaluate, "eval")  # told, but no candidate for the best checkpoint
        if self._pause_due():  # killed between the save and the word that it paused, or asked for once more
            self._pause(measured=False)
            listener.on_train_end(self.step)
            return Outcome(self.step, self.status, dict(self.metrics))
        self.model.train()
        self._last_line = time.perf_counter()
        with closing(self._batches()) as batches:
            for micro_batches in batches:
                logged = self._every(run.loop.logging_steps, self.step + 1)
                watch = run.watch if run.watch is not None and run.watch.due(self.step + 1) else None
                result = self._run_step(micro_batches, watch)
                if self._recovered():
                    continue
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
                if self._pause_due():
                    self._pause(measured=self._evaluation_due())
                    break
        self._write_lines()
        listener.on_train_end(self.step)
        return Outcome(self.step, self.status, dict(self.metrics))

    @property
    def position(self) -> int:
        """Steps of the plan of the data that were used or passed over."""
        return self.step + self.passed_over

    def _batches(self) -> Generator[Sequence[Batch], None, None]:
        """The data from the present position on; going back to a checkpoint leaves more steps than were planned."""
        run, engine, known = self.run, self.engine, None
        while self.step < run.max_steps and known != self.passed_over:  # a source that ends early ends the run
            known = self.passed_over
            stop = run.max_steps + self.passed_over
            stream = run.batches(start=self.position, stop=stop, rank=engine.rank, world_size=engine.world_size)
            with closing(cast(Any, stream)):
                yield from self._timed(stream)

    def _timed(self, stream: Iterator[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
        """The same; the wait for a batch counts unless an accelerator is still at work on the last one."""
        while True:
            started = time.perf_counter()
            micro_batches = next(stream, None)
            if micro_batches is None:
                return
            if self._pending is None or self._pending.readings.are_here():
                self._waited += time.perf_counter() - started
            yield micro_batches

    def _run_step(self, micro_batches: Sequence[Batch], watch: Watch | None) -> StepResult:
        result = None
        while result is None:  # memory runs out in few steps of few runs
            self.engine.seed(_mix(self.run.seed, self.position, self.engine.rank))
            with nullcontext() if watch is None else watch.watching(self.step + 1):
                result = train_step(
                    self.engine,
                    self.model,
                    self.run.optimizers,
                    micro_batches,
                    self.run.loss,
                    clip=self.run.clip,
                    tell_norms=None if watch is None else watch.tell_norms,
                    limits=self._before_update,
                    stop_requested=self.stop.signal_number is not None,
                    parts=self.parts,
                )
            if result is None:
                self._cut_smaller()
        self._write_lines()  # the last step's numbers have come while this one was launched
        self.step += 1
        numbers = {"loss": result.loss_sum, "norm": result.grad_norm, "taken": result.taken, **result.clip}
        self._pending = _Pending(self.step, self.interval, result, Readings(numbers))
        every = self.run.checkpoint.every
        if (
            self.engine.device.type == "cpu"
            or result.stop_requested
            or self._evaluation_due()
            or self._pause_due()
            or self._every(every, self.step)
        ):
            self._settle()
        if self.step == self.run.max_steps and self._answer is None:
            self._answer, self._details = self.run.guard.conclude(self.step), {}
        return result

    def _cut_smaller(self) -> None:
        """Memory ran out: the step is repeated, and it and all after it are done in parts of half the size."""
        self.parts *= 2
        message = (
            f"Memory ran out in step {self.step + 1}: its batch is repeated, and from here on each micro-batch is cut into "
            f"{self.parts} parts. Double gradient_accumulation_steps in the next run."
        )
        self.listener.on_event(self.step + 1, "out_of_memory", message, {"parts": self.parts})

    def _before_update(self) -> tuple[float, float]:
        """Hear what came of the last step, set the rates, and answer the limits of this one."""
        self._settle()
        # The step's number alone decides, with what the guard did: that is all a resume needs.
        factor = self.run.schedule(self.step - self.skipped) * self.run.guard.rate_factor
        for optimizer in self.run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        return self.run.guard.limits() if self._answer is None else _NOTHING

    def _settle(self) -> None:
        """Take the numbers of the last step in. A processor has them at once, an accelerator while it runs the next."""
        pending, self._pending = self._pending, None
        if pending is None or self._answer is not None:  # after an answer that ends this stretch nothing counts
            return
        numbers, result = pending.readings.values(), pending.result
        loss, norm, taken = numbers["loss"] / result.num_items, numbers["norm"], bool(numbers["taken"])
        if taken:
            pending.interval.add(loss, norm, result.num_items, clip={key: numbers[key] for key in result.clip})
            if self.average is not None:
                self.average.update_parameters(self.run.model)
        else:
            pending.interval.num_skipped += 1
            self.skipped += 1
        answer = self.run.guard.observe(pending.step, loss, norm, taken=taken, places=self._names(result.suspects))
        if answer is not None:
            details = {"loss": loss, "grad_norm": norm, "batch": pending.step + self.passed_over, **answer.details}
            if answer.do == "go_on":
                self.listener.on_event(pending.step, answer.kind, answer.message, details)
            else:
                self._answer, self._details = answer, details

    def _names(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        chosen = set(map(id, parameters))
        return (
            [name for name, parameter in self.run.model.named_parameters() if id(parameter) in chosen] if chosen else []
        )

    def _recovered(self) -> bool:
        """Whether the guard's answer ended this stretch of the run, and the run stands at a checkpoint again.

        Raises:
            DivergedError: There is no way back.
        """
        answer, self._answer = self._answer, None
        if answer is None:
            return False
        target = None
        if answer.do == "roll_back":
            found = (
                rollback_target(self.checkpoints, self.anchors, horizon=answer.kept_from)
                if self.engine.is_main
                else None
            )
            target = self.engine.gather([found])[0]
        if target is None:
            if answer.do == "roll_back":
                back = "there is no checkpoint yet to go back to"
            elif self.anchors:
                back = "the last checkpoint before it is untouched: resume from it when that is done"
            else:
                back = "there is no checkpoint"
            message = f"{answer.message} The run ends; {back}."
            self.listener.on_event(self.step, "diverged", message, self._details)
            raise DivergedError(f"step {self.step}: {message}")
        self._roll_back(target, answer)
        return True

    def _roll_back(self, target: Path, answer: Answer) -> None:
        """Stand at a checkpoint again; the data go on where they were, so that those seen since are passed over."""
        step, position, lost = self.step, self.position, self.run.guard.state()
        self._lines, self._pending = [], None
        self.restore(load(target))
        self.passed_over = position - self.step
        self.run.guard.rolled_back(lost)
        self.engine.wait()  # nobody reads any more
        if self.engine.is_main and self.checkpoints.forget_after(self.step):
            self.selection = Selection(self.selection.metric, self.selection.mode)
        # What the main process found about the best checkpoint holds for all.
        self.selection = self.engine.gather([self.selection])[0]
        self.listener.on_rollback(self.step)
        message = (
            f"{answer.message} The run went back to step {self.step}, passes over the data of the {step - self.step} steps "
            f"since, and goes on with {self.run.guard.rate_factor:g} times the learning rate."
        )
        self.listener.on_event(step, answer.kind, message, {**self._details, "to_step": self.step})
        self._last_line, self._waited = time.perf_counter(), 0.0

    def _every(self, steps: int | None, step: int) -> bool:
        return steps is not None and (step % steps == 0 or step == self.run.max_steps)

    def _evaluation_due(self) -> bool:
        if self.run.loop.eval_steps is not None or self.step == self.run.max_steps:
            return self._every(self.run.loop.eval_steps or 1, self.step)
        return self.run.plan.locate(self.position)[1] == 0

    def _begin_line(self, logged: bool, measured: Mapping[str, Tensor]) -> None:
        """Start moving what was measured to the host. A processor has it at once, an accelerator by the next step."""
        interval, self.interval = (self.interval, Interval()) if logged else (None, self.interval)
        now = time.perf_counter()
        seconds, waited = now - self._last_line, self._waited
        if logged:
            self._last_line, self._waited = now, 0.0
        rate = max(group["lr"] for optimizer in self.run.optimizers for group in optimizer.param_groups)
        self._lines.append(_Line(self.step, self._epoch(), interval, Readings(measured), rate, seconds, waited))
        if self.engine.device.type == "cpu":
            self._write_lines()

    def _write_lines(self) -> None:
        """Write the lines that were begun."""
        while self._lines:
            line = self._lines.pop(0)
            measured = line.readings.values()
            logged = {} if line.interval is None else self._write_line(line, line.interval, measured)
            if measured:
                self.listener.on_probe(line.step, measured)
            self._judge(line.step, {"train/lr": line.rate, **logged, **measured})

    def _judge(self, step: int, values: Mapping[str, float]) -> None:
        """Tell what the detectors make of a step's measurements."""
        for verdict in self.run.detectors.observe(step, values) if self.run.detectors is not None else ():
            self.listener.on_event(step, "verdict", str(verdict), verdict.details)

    def _write_line(self, line: _Line, interval: Interval, measured: Mapping[str, float]) -> dict[str, float]:
        run = self.run
        values = {"epoch": line.epoch, **interval.line(), "train/lr": line.rate}
        if run.watch is not None:
            values |= run.watch.summary(measured)
        if len(interval):
            values[f"perf/{run.unit}_per_second"] = interval.num_items / line.seconds
            values["perf/step_seconds"] = line.seconds / (len(interval) + interval.num_skipped)
            values["perf/data_wait"] = line.waited / line.seconds
        self.metrics |= values
        self.listener.on_log(line.step, values)
        return values

    def _evaluate(self) -> bool:
        """Measure, tell, and return whether it is the best so far."""
        self._write_lines()
        if self.run.evaluate is None:
            return False
        values = self._measure(self.run.evaluate, "eval")
        return self.selection.update(self.step, values)

    def _measure(self, evaluation: Evaluation, prefix: str, *, judged: bool = True) -> dict[str, float]:
        started = time.perf_counter()
        model = self.run.model if self.average is None else cast(nn.Module, self.average.module)
        with evaluating(model), self.engine.autocast():
            values = {f"{prefix}/{key}": value for key, value in evaluation(self.engine, model).items()}
        self._last_line += time.perf_counter() - started  # throughput is that of training
        self.metrics |= values
        self.listener.on_evaluate(self.step, {"epoch": self._epoch(), **values})
        if judged:  # the detectors remember what they saw: a run that never paused has not seen this
            self._judge(self.step, values)
        return values

    def _epoch(self) -> float:
        if self.position == 0:
            return 0.0
        epoch, position = self.run.plan.locate(self.position - 1)
        return epoch + (position + 1) / self.run.plan.steps_in_epoch(epoch)

    def _save(self, *, best: bool = False, scheduled: bool = True) -> None:
        """Publish a checkpoint, unless a value in it is not finite; a full disk is an event, not an end.

        Args:
            best: Whether it is the best so far.
            scheduled: False for one that a signal asked for: a rollback passes it over.
        """
        started = time.perf_counter()
        self._write_lines()
        before = self.anchors
        if scheduled:
            horizon = self.run.guard.horizon(self.step)
            self.anchors = anchors_to_keep([*before, self.step], keep_last=self.checkpoints.keep_last, horizon=horizon)
        snapshot = self.snapshot()
        broken = first_not_finite(snapshot, (name for name, _ in self.run.model.named_parameters()))
        self._saved_step = self.step if broken is None else None
        if broken is not None:
            self.anchors = before
            message = f"checkpoint of step {self.step} was not written: {broken} is not finite; the run goes on"
            self.listener.on_event(self.step, "checkpoint_failed", message, {})
            if self.status != "running":
                message = f"{broken} is not finite after the last step; resume from the checkpoint before it"
                self.listener.on_event(self.step, "diverged", message, {})
                raise DivergedError(f"step {self.step}: {message}")
        elif self.engine.is_main:
            try:
                self.checkpoints.save(self.step, snapshot, best=best, spare=self.anchors)
            except OSError as error:
                self._saved_step, self.anchors = None, before
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
        self._make_sure_of_a_checkpoint()
        self.listener.on_event(self.step, "stop", f"stopped by a signal after step {self.step}", {})

    def _make_sure_of_a_checkpoint(self) -> None:
        """Save, unless this step is saved already, and read the checkpoint back: nobody is there to try again."""
        if self._saved_step != self.step:
            self._save(scheduled=False)
        self.engine.wait()
        if self._saved_step == self.step:
            verify(self.checkpoints.path(self.step))

    def _pause_due(self) -> bool:
        pause = self.run.loop.pause_step(self.run.max_steps)
        return pause is not None and self.step >= pause

    def _pause(self, *, measured: bool) -> None:
        """Evaluate, save and tell; what a run that never paused would not have measured here decides nothing later."""
        if not measured and self.run.evaluate is not None:
            self._write_lines()
            self._measure(self.run.evaluate, "eval", judged=False)
        self._make_sure_of_a_checkpoint()
        share = self.run.loop.pause_after
        message = (
            f"paused after step {self.step}, {share:g} of the run; a resume with a larger pause_after, or null, goes on"
        )
        found = {key: value for key, value in self.metrics.items() if key.startswith("eval/")}
        self.listener.on_event(self.step, "pause", message, found)

    def snapshot(self) -> Snapshot:
        """All that `restore` needs; every process must call it, the main one's answer is whole."""
        return Snapshot(
            model=model_tensors(self.run.model),
            optimizer=optimizer_tensors(self.run.optimizers, self.run.model),
            average={} if self.average is None else model_tensors(self.average),
            state={
                "step": self.step,
                "skipped": self.skipped,
                "passed_over": self.passed_over,
                "anchors": self.anchors,
                "parts": self.parts,
                "guard": self.run.guard.state(),
                "clip": self.run.clip.state_dict(),
                "detectors": {} if self.run.detectors is None else self.run.detectors.state(),
                "status": self.status,
                "interval": self.interval.state(),
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
        self.skipped, self.passed_over = snapshot.state["skipped"], snapshot.state["passed_over"]
        self.anchors = list(snapshot.state["anchors"])
        # What memory cannot hold is not forgotten by going back; checkpoints of runs begun before this was kept say nothing.
        self.parts = max(self.parts, snapshot.state.get("parts", 1))
        self.run.guard.load(snapshot.state["guard"])
        self.run.clip.load_state_dict(snapshot.state.get("clip", {}))
        if self.run.detectors is not None:
            self.run.detectors.load(snapshot.state.get("detectors", {}))
        self.selection = Selection(**snapshot.state["selection"])
        self.metrics = dict(snapshot.state["metrics"])
        self.interval = Interval.of(snapshot.state["interval"])


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
