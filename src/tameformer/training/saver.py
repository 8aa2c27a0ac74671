"""Saving a run and putting it back where it was saved: which checkpoints, when one counts, and what is in it."""

from pathlib import Path

from tameformer.errors import DivergedError
from tameformer.training.checkpoint import (
    CheckpointFolder,
    Snapshot,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    verify,
)
from tameformer.training.engine import Engine
from tameformer.training.events import Listener
from tameformer.training.progress import Progress
from tameformer.training.recovery import anchors_to_keep, first_not_finite, rollback_target
from tameformer.training.run import Run
from tameformer.training.selection import Selection


class Saver:
    """The checkpoints of a run while it trains.

    Args:
        run: What is saved.
        engine: Device and processes; every process calls every method.
        checkpoints: Where checkpoints go.
        progress: Where the run stands, which is part of a checkpoint, too.
        listener: Told of what was saved and what was not.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        checkpoints: CheckpointFolder,
        progress: Progress,
        listener: Listener,
    ) -> None:
        self.run, self.engine, self.checkpoints = run, engine, checkpoints
        self.progress, self.listener = progress, listener
        self._saved_step: int | None = None

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of the present step."""
        return self._saved_step == self.progress.step

    def save(self, *, best: bool = False, scheduled: bool = True) -> None:
        """Publish a checkpoint, unless a value in it is not finite; a full disk is an event, not an end.

        The last one of a run, or of a process that was told to stop, is tried twice.

        Args:
            best: Whether it is the best so far.
            scheduled: False for one that a signal asked for: a rollback passes it over.

        Raises:
            DivergedError: A value is not finite after the run's last step.
        """
        progress, listener = self.progress, self.listener
        step, before = progress.step, progress.anchors
        if scheduled:
            keep_last, horizon = self.checkpoints.keep_last, self.run.guard.horizon(step)
            progress.anchors = anchors_to_keep([*before, step], keep_last=keep_last, horizon=horizon)
        snapshot = self.snapshot()
        broken = first_not_finite(snapshot, (name for name, _ in self.run.model.named_parameters()))
        self._saved_step = step if broken is None else None
        if broken is not None:
            progress.anchors = before
            message = f"checkpoint of step {step} was not written: {broken} is not finite; the run goes on"
            listener.on_event(step, "checkpoint_failed", message, {})
            if progress.status != "running":
                message = f"{broken} is not finite after the last step; resume from the checkpoint before it"
                listener.on_event(step, "diverged", message, {})
                raise DivergedError(f"step {step}: {message}")
        elif self.engine.is_main:
            nobody_tries_again = not scheduled or progress.status != "running"
            try:
                self._write(snapshot, best=best, twice=nobody_tries_again)
            except OSError as error:
                self._saved_step, progress.anchors = None, before
                listener.on_event(step, "checkpoint_failed", f"{error}; the run goes on", {})
            else:
                listener.on_save(step)

    def _write(self, snapshot: Snapshot, *, best: bool, twice: bool) -> None:
        step, spare = self.progress.step, self.progress.anchors
        try:
            self.checkpoints.save(step, snapshot, best=best, spare=spare)
        except OSError as error:
            if not twice:
                raise
            self.listener.on_event(step, "checkpoint_retry", f"{error}; it is the last one, and tried once more", {})
            self.checkpoints.save(step, snapshot, best=best, spare=spare)

    def verify(self) -> None:
        """Read the checkpoint of the present step back, if there is one.

        Raises:
            CheckpointError: It is not what was written.
        """
        self.engine.wait()
        if self.is_saved:
            verify(self.checkpoints.path(self.progress.step))

    def way_back(self, kept_from: int) -> Path | None:
        """The checkpoint to go back to, where those after step `kept_from` are in doubt; None if there is none."""
        found = None
        if self.engine.is_main:
            found = rollback_target(self.checkpoints, self.progress.anchors, horizon=kept_from)
        return self.engine.gather([found])[0]

    def forget_later(self) -> None:
        """Remove the checkpoints of steps after the present one; if the best was one of them, none is the best now."""
        progress = self.progress
        self.engine.wait()  # nobody reads any more
        if self.engine.is_main and self.checkpoints.forget_after(progress.step):
            progress.selection = Selection(progress.selection.metric, progress.selection.mode)
        # What the main process found about the best checkpoint holds for all.
        progress.selection = self.engine.gather([progress.selection])[0]

    def snapshot(self) -> Snapshot:
        """All that `restore` needs; every process must call it, the main one's answer is whole."""
        run = self.run
        return Snapshot(
            model=model_tensors(run.model),
            optimizer=optimizer_tensors(run.optimizers, run.model),
            average={} if run.average is None else model_tensors(run.average),
            state={
                **self.progress.state(),
                "guard": run.guard.state(),
                "clip": run.clip.state_dict(),
                "detectors": {} if run.detectors is None else run.detectors.state(),
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue where a checkpoint was taken.

        Raises:
            CheckpointError: It does not fit the model or the optimizers, or lies beyond the run's end.
        """
        run, state = self.run, snapshot.state
        load_model_tensors(run.model, snapshot.model)
        load_optimizer_tensors(run.optimizers, run.model, snapshot.optimizer)
        if run.average is not None:
            load_model_tensors(run.average, snapshot.average)
        self.progress.load(state, max_steps=run.max_steps)
        self._saved_step = self.progress.step
        run.guard.load(state["guard"])
        run.clip.load_state_dict(state.get("clip", {}))
        if run.detectors is not None:
            run.detectors.load(state.get("detectors", {}))
