"""Steps under a guard: launched, counted, and settled when their numbers have come to the host."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from tameformer.readings import Readings
from tameformer.training.average import advance
from tameformer.training.engine import Engine
from tameformer.training.events import Listener
from tameformer.training.interval import Interval
from tameformer.training.progress import Progress
from tameformer.training.recovery import Answer
from tameformer.training.run import Run, Watch
from tameformer.training.signals import StopRequest
from tameformer.training.step import Batch, StepResult, train_step

_NOTHING = (float("-inf"), float("-inf"))  # the limits of a step that must not be taken


@dataclass(frozen=True)
class Setback:
    """The guard's answer to a step after which the run must not just go on."""

    answer: Answer
    details: Mapping[str, Any]
    """Its details, and those of the step."""


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are on their way to the host: an accelerator has them while it runs the next one."""

    step: int
    interval: Interval
    result: StepResult
    readings: Readings


class GuardedSteps:
    """Takes the steps of a run that its guard allows.

    A step is launched, then counted, and settled once its numbers are there: when the next one is about to update the
    weights, or sooner for who needs to know.

    Args:
        run: Whose steps they are.
        engine: Device and processes.
        model: As `engine.prepare` returned it.
        progress: Where the run stands.
        listener: Told of what is out of the ordinary.
        stop: Asked for in every step, so that all processes know of it.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        model: nn.Module,
        progress: Progress,
        listener: Listener,
        stop: StopRequest,
    ) -> None:
        self.run, self.engine, self.model = run, engine, model
        self.progress, self.listener, self.stop = progress, listener, stop
        self._pending: _Pending | None = None
        self._setback: Setback | None = None

    def launch(self, micro_batches: Sequence[Batch], watch: Watch | None) -> StepResult:
        """Run the next step, in smaller parts until memory holds them; an accelerator is at work on it afterwards."""
        run, progress = self.run, self.progress
        while True:
            self.engine.seed(_mix(run.seed, progress.position, self.engine.rank))
            with nullcontext() if watch is None else watch.watching(progress.step + 1):
                result = train_step(
                    self.engine,
                    self.model,
                    run.optimizers,
                    micro_batches,
                    run.loss,
                    clip=run.clip,
                    tell_norms=None if watch is None else watch.tell_norms,
                    limits=self._before_update,
                    stop_requested=self.stop.signal_number is not None,
                    parts=progress.parts,
                )
            if result is not None:
                return result
            self._cut_smaller()  # memory runs out in few steps of few runs

    def count(self, result: StepResult) -> None:
        """The step that was launched is the present one now; its numbers start moving to the host."""
        self.progress.step += 1
        numbers = {"loss": result.loss_sum, "norm": result.grad_norm, "taken": result.taken, **result.clip}
        self._pending = _Pending(self.progress.step, self.progress.interval, result, Readings(numbers))

    def settle(self) -> None:
        """Take the numbers of the last step in. A processor has them at once, an accelerator while it runs the next."""
        pending, self._pending = self._pending, None
        if pending is None or self._setback is not None:  # after a setback nothing counts
            return
        progress, numbers, result = self.progress, pending.readings.values(), pending.result
        loss, norm, taken = numbers["loss"] / result.num_items, numbers["norm"], bool(numbers["taken"])
        if taken:
            pending.interval.add(loss, norm, result.num_items, clip={key: numbers[key] for key in result.clip})
            if self.run.average is not None:
                advance(self.run.average, self.run.model)
        else:
            pending.interval.num_skipped += 1
            progress.skipped += 1
        answer = self.run.guard.observe(pending.step, loss, norm, taken=taken, places=self._names(result.suspects))
        if answer is not None:
            batch = pending.step + progress.passed_over
            details = {"loss": loss, "grad_norm": norm, "batch": batch, **answer.details}
            if answer.do == "go_on":
                self.listener.on_event(pending.step, answer.kind, answer.message, details)
            else:
                self._setback = Setback(answer, details)

    def conclude(self) -> None:
        """Hear whether the run may end with the present step, its last."""
        answer = None if self._setback is not None else self.run.guard.conclude(self.progress.step)
        if answer is not None:
            self._setback = Setback(answer, {})

    def take_setback(self) -> Setback | None:
        """What the run has to answer to before its next step, if anything; asked for once."""
        setback, self._setback = self._setback, None
        return setback

    def forget(self) -> None:
        """Settle nothing that was counted: the run went back to before it."""
        self._pending = None

    def is_busy(self) -> bool:
        """Whether an accelerator is still at work on the last step."""
        return self._pending is not None and not self._pending.readings.are_here()

    def _before_update(self) -> tuple[float, float]:
        """Hear what came of the last step, set the rates, and answer the limits of this one."""
        self.settle()
        # The step's number alone decides, with what the guard did: that is all a resume needs.
        factor = self.run.schedule(self.progress.step - self.progress.skipped) * self.run.guard.rate_factor
        for optimizer in self.run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        return self.run.guard.limits() if self._setback is None else _NOTHING

    def _cut_smaller(self) -> None:
        """Memory ran out: the step is repeated, and it and all after it are done in parts of half the size."""
        progress = self.progress
        progress.parts *= 2
        message = (
            f"Memory ran out in step {progress.step + 1}: its batch is repeated, and from here on each micro-batch is cut "
            f"into {progress.parts} parts. Double gradient_accumulation_steps in the next run."
        )
        self.listener.on_event(progress.step + 1, "out_of_memory", message, {"parts": progress.parts})

    def _names(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        chosen = set(map(id, parameters))
        return (
            [name for name, parameter in self.run.model.named_parameters() if id(parameter) in chosen] if chosen else []
        )


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
