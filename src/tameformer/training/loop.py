"""The training loop. It builds nothing: it is handed finished objects, and tells listeners what happens.

It is the story of a run. How a step is taken is in guarded.py, what is written of it in log.py, how a run is saved and put
back in saver.py; what all of them share, where the run stands, in progress.py.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from tameformer.errors import DivergedError
from tameformer.training.checkpoint import CheckpointFolder, Snapshot, load
from tameformer.training.engine import Engine, evaluating
from tameformer.training.events import Listener
from tameformer.training.guarded import GuardedSteps, Setback
from tameformer.training.log import Log
from tameformer.training.progress import Progress, Status
from tameformer.training.run import Evaluation, Run, Watch
from tameformer.training.saver import Saver
from tameformer.training.selection import Selection
from tameformer.training.sharding import whole
from tameformer.training.signals import StopRequest
from tameformer.training.step import Batch, StepResult


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
    """One run while it trains.

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
        self.run, self.engine, self.listener = run, engine, listener
        self.model = engine.prepare(run.model)
        if run.average is not None:  # its count stays where it can be read without waiting
            run.average.module.to(engine.device, non_blocking=True)
        self.progress = Progress(Selection(run.checkpoint.best_metric, run.checkpoint.best_mode))
        self.log = Log(run, self.progress, listener, at_once=self._is_synchronous)
        self.steps = GuardedSteps(run, engine, self.model, self.progress, listener, stop)
        self.saver = Saver(run, engine, checkpoints, self.progress, listener)

    @property
    def step(self) -> int:
        """Steps completed."""
        return self.progress.step

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where a checkpoint was taken.

        Raises:
            CheckpointError: It does not fit the model or the optimizers, or lies beyond the run's end.
        """
        self.saver.restore(snapshot)

    def train(self) -> Outcome:
        """Run from the present step to the end, an early stop, a signal or a pause.

        Raises:
            DivergedError: The guard could not bring the run back; its checkpoints are sound.
        """
        run, progress = self.run, self.progress
        if progress.status == "running":
            self.listener.on_train_begin(start_step=progress.step, max_steps=run.max_steps)
            if progress.step == 0 and run.loop.eval_on_start and run.evaluate is not None:
                self._measure(run.evaluate, "eval")  # told, but no candidate for the best checkpoint
            if self._pause_due():  # killed between the save and the word that it paused, or asked for once more
                self._pause(measured=False)
            else:
                self._take_steps()
            self.log.write()
            self.listener.on_train_end(progress.step)
        else:  # said after every resume, and by no other word where the run was killed right after its last checkpoint
            self.listener.on_event(progress.step, "finish", f"{self._ending()} already", {})
        return Outcome(progress.step, progress.status, dict(progress.metrics))

    def _take_steps(self) -> None:
        run, progress = self.run, self.progress
        self.model.train()
        self.log.start_clock()
        with closing(self._batches()) as batches:
            for micro_batches in batches:
                logged = self._every(run.loop.logging_steps, progress.step + 1)
                watch = run.watch if run.watch is not None and run.watch.due(progress.step + 1) else None
                result = self._take_step(micro_batches, watch)
                setback = self.steps.take_setback()
                if setback is not None:
                    self._roll_back(setback)
                    continue
                if logged or watch is not None:
                    self.log.begin_line({} if watch is None else watch.read(), ends_interval=logged)
                if watch is not None:
                    self.log.tell_unseen(watch.unseen())
                if self._evaluation_due():
                    self._evaluate_and_save()
                elif self._every(run.checkpoint.every, progress.step):
                    self._save()
                if progress.status != "running":
                    self._tell_end()
                    break
                if result.stop_requested:
                    self._make_sure_of_a_checkpoint()
                    message = f"stopped by a signal after step {progress.step}"
                    self.listener.on_event(progress.step, "stop", message, {})
                    break
                if self._pause_due():
                    self._pause(measured=self._evaluation_due())
                    break

    def _batches(self) -> Generator[Sequence[Batch], None, None]:
        """The data from the present position on; going back to a checkpoint leaves more steps than were planned."""
        run, engine, progress, known = self.run, self.engine, self.progress, None
        while progress.step < run.max_steps and known != progress.passed_over:  # a source that ends early ends the run
            known = progress.passed_over
            stop = run.max_steps + known
            stream = run.batches(start=progress.position, stop=stop, rank=engine.rank, world_size=engine.world_size)
            with closing(cast(Any, stream)):
                yield from self._timed(stream)

    def _timed(self, stream: Iterator[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
        """The same; the wait for a batch counts unless an accelerator is still at work on the last one."""
        while True:
            started = time.perf_counter()
            micro_batches = next(stream, None)
            if micro_batches is None:
                return
            if not self.steps.is_busy():
                self.log.add_wait(time.perf_counter() - started)
            yield micro_batches

    def _take_step(self, micro_batches: Sequence[Batch], watch: Watch | None) -> StepResult:
        result = self.steps.launch(micro_batches, watch)
        self.log.write()  # the last step's numbers have come while this one was launched
        self.steps.count(result)
        if (
            self._is_synchronous
            or result.stop_requested
            or self._evaluation_due()
            or self._pause_due()
            or self._every(self.run.checkpoint.every, self.step)
        ):
            self.steps.settle()
        if self.step == self.run.max_steps:
            self.steps.conclude()
        return result

    def _roll_back(self, setback: Setback) -> None:
        """Stand at a checkpoint again; the data go on where they were, so that those seen since are passed over.

        Raises:
            DivergedError: The guard has given up, or there is no way back.
        """
        answer, progress, guard = setback.answer, self.progress, self.run.guard
        target = self.saver.way_back(answer.kept_from) if answer.do == "roll_back" else None
        if target is None:
            self._give_up(setback)
        step, position, lost = progress.step, progress.position, guard.state()
        self.log.forget()
        self.steps.forget()
        self.restore(load(target))
        progress.passed_over = position - progress.step
        guard.rolled_back(lost)
        self.saver.forget_later()
        self.listener.on_rollback(progress.step)
        message = (
            f"{answer.message} The run went back to step {progress.step}, passes over the data of the "
            f"{step - progress.step} steps since, and goes on with {guard.rate_factor:g} times the learning rate."
        )
        self.listener.on_event(step, answer.kind, message, {**setback.details, "to_step": progress.step})
        self.log.start_clock()

    def _give_up(self, setback: Setback) -> NoReturn:
        answer, step = setback.answer, self.step
        if answer.do == "roll_back":
            back = "there is no checkpoint yet to go back to"
        elif self.progress.anchors:
            back = "the last checkpoint before it is untouched: resume from it when that is done"
        else:
            back = "there is no checkpoint"
        message = f"{answer.message} The run ends; {back}."
        self.listener.on_event(step, "diverged", message, setback.details)
        raise DivergedError(f"step {step}: {message}")

    def _evaluate_and_save(self) -> None:
        """Measure, see whether the run has ended, and save what is to be kept."""
        run, progress, is_best = self.run, self.progress, False
        self.log.write()
        if run.evaluate is not None:
            is_best = progress.selection.update(progress.step, self._measure(run.evaluate, "eval"))
        if progress.step == run.max_steps:
            progress.status = "finished"
        elif progress.selection.exhausted(run.loop.early_stopping_patience):
            progress.status = "early_stopped"
        has_ended, every = progress.status != "running", run.checkpoint.every
        if has_ended and run.test is not None:
            self._measure(run.test, "test")
        if every is None or is_best or has_ended or self._every(every, progress.step):
            self._save(best=is_best)

    def _measure(self, evaluation: Evaluation, prefix: str, *, judged: bool = True) -> dict[str, float]:
        model = self.run.model if self.run.average is None else self.run.average.module
        with self.log.off_the_clock(), evaluating(model), whole(model), self.engine.autocast():
            values = {f"{prefix}/{key}": value for key, value in evaluation(self.engine, model).items()}
        self.log.write_evaluation(values, judged=judged)
        return values

    def _save(self, *, best: bool = False, scheduled: bool = True) -> None:
        with self.log.off_the_clock():
            self.log.write()
            self.saver.save(best=best, scheduled=scheduled)

    def _make_sure_of_a_checkpoint(self) -> None:
        """Save, unless this step is saved already, and read the checkpoint back: nobody is there to try again."""
        if not self.saver.is_saved:
            self._save(scheduled=False)
        self.saver.verify()

    def _pause(self, *, measured: bool) -> None:
        """Evaluate, save and tell; what a run that never paused would not have measured here decides nothing later."""
        if not measured and self.run.evaluate is not None:
            self.log.write()
            # The detectors remember what they saw: a run that never paused has not seen this.
            self._measure(self.run.evaluate, "eval", judged=False)
        self._make_sure_of_a_checkpoint()
        share = self.run.loop.pause_after
        message = (
            f"paused after step {self.step}, {share:g} of the run; a resume with a larger pause_after, or null, goes on"
        )
        found = {key: value for key, value in self.progress.metrics.items() if key.startswith("eval/")}
        self.listener.on_event(self.step, "pause", message, found)

    def _tell_end(self) -> None:
        seconds = time.process_time()
        message = f"{self._ending()}; {seconds:.1f} s of processor time so far"
        if not self.saver.is_saved:
            message += "; its last checkpoint could not be written: make room, then resume to repeat the steps since the newest"
        self.listener.on_event(self.step, "finish", message, {"processor_seconds": seconds})

    def _ending(self) -> str:
        if self.progress.status == "early_stopped":
            best = self.progress.selection
            return (
                f"stopped early after step {self.step}: {best.metric} was best at step {best.best_step} ({best.best})"
            )
        return f"finished after step {self.step}"

    @property
    def _is_synchronous(self) -> bool:
        """Whether the numbers of a step are there when it returns: an accelerator has them one step later."""
        return self.engine.device.type == "cpu"

    def _every(self, steps: int | None, step: int) -> bool:
        return steps is not None and (step % steps == 0 or step == self.run.max_steps)

    def _evaluation_due(self) -> bool:
        if self.run.loop.eval_steps is not None or self.step == self.run.max_steps:
            return self._every(self.run.loop.eval_steps or 1, self.step)
        return self.run.plan.locate(self.progress.position)[1] == 0

    def _pause_due(self) -> bool:
        pause = self.run.loop.pause_step(self.run.max_steps)
        return pause is not None and self.step >= pause
