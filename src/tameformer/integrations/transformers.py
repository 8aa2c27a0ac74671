"""The measurements of `Monitor`, and the guard, in the Hugging Face Trainer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tameformer.errors import DivergedError, missing_extra
from tameformer.health import Detectors, GuardConfig, Monitor
from tameformer.health.monitor import Tracker
from tameformer.integrations.guarded import GuardedSteps, gradient_norm, refuse_what_cannot_be_guarded
from tameformer.integrations.monitored import monitored, real_optimizer
from tameformer.probes import Probe

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("transformers", "hf") from error

_OF_THE_TRAINER = {"epoch", "learning_rate"}
"""What the Trainer adds to each line: the run folder has its own words for it."""
_GUARD = "tameformer.guard"
"""Where the guard's windows and counts lie in the `trainer_state.json` of the Trainer's checkpoints."""


class TameCallback(TrainerCallback):
    """Records what happens inside the model while the Trainer trains it, and changes nothing about the training.

    With `guard` it refuses steps whose loss or gradient is not finite or a spike: weights, moments, the count behind Adam's
    bias correction and the learning rate's schedule stay as they are. The Trainer counts the step. When too many are refused,
    `train()` ends with a `DivergedError`; going back to a checkpoint is not for a callback to do.

    `train/loss` and the other training metrics are those of the Trainer's own log, so they come every
    `TrainingArguments.logging_steps`: it tells nobody the loss of a step. By default it also replaces a non-finite loss by
    the mean of the others; with `logging_nan_inf_filter=False` it is logged as it is.

    The Trainer tells callbacks of no exception. After one, what a measured step had put on the model goes with `close`, with
    the end of a `with` block around `train`, or when the callback's next training begins.

    Args:
        output_dir: The run folder; None is `tame` in the Trainer's `output_dir`, or `tame-2` where `tame` holds a run.
        every: Optimizer steps from one measurement to the next, and from one line of the log to the next.
        probes: Probes with a cadence each; None takes `tameformer.probes.default_probes` at `every`.
        trackers: Called with the step and the measurements of each line, see `tameformer.integrations.trackers`.
        detectors: Builds what is warned of, for each training anew, such as `tame.DetectorsConfig(data_wait=None).build`.
        guard: When steps are refused, such as `tame.GuardConfig()`; None refuses none. Gradients are judged after the
            Trainer's clipping, where only what is not finite stands out; `max_grad_norm=0` shows spikes, too.

    Raises:
        RecordError: When training begins at step 0 and `output_dir` holds a run already.
        ValueError: When training begins with `guard` under fp16 or DeepSpeed.

    Example:
        >>> TameCallback("runs/bert", every=50).output_dir
        'runs/bert'
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        *,
        every: int = 10,
        probes: Sequence[tuple[Probe, int]] | None = None,
        trackers: Sequence[Tracker] = (),
        detectors: Callable[[], Detectors] = Detectors,
        guard: GuardConfig | None = None,
    ) -> None:
        self.detectors, self.guard = detectors, guard
        self.output_dir, self.every, self.probes, self.trackers = output_dir, every, probes, tuple(trackers)
        self.monitor: Monitor | None = None
        """What does the work, from the beginning of training on."""
        self.guarded: GuardedSteps | None = None
        """What refuses steps, from the beginning of training on."""
        self._loss_hook: RemovableHandle | None = None
        self._is_in_step = False  # an evaluation's losses are none of a step

    def close(self) -> None:
        """Take everything off the model and close the files; does nothing where nothing is open."""
        self._end(None)

    def __enter__(self) -> "TameCallback":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._end(error)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Open the run folder, or continue it where a checkpoint is resumed."""
        self._end(InterruptedError("training began anew"))
        if self.guard is not None:
            refuse_what_cannot_be_guarded(scales_loss=args.fp16, is_deepspeed=bool(args.deepspeed))
        self.monitor = monitored(
            given["model"],
            [given["optimizer"]],
            output_dir=self.output_dir,
            default_dir=Path(args.output_dir) / "tame",
            start_step=state.global_step,
            every=self.every,
            probes=self.probes,
            trackers=self.trackers,
            detectors=self.detectors(),
        )
        if self.guard is not None:
            self.guarded = GuardedSteps(
                given["model"],
                real_optimizer(given["optimizer"]),
                output_dir=self.monitor.folder,
                config=self.guard,
                steps_done=state.global_step,
                state=state.stateful_callbacks.get(_GUARD),
            )
            self._loss_hook = given["model"].register_forward_hook(self._see_loss, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        if self.monitor is not None:
            self.monitor.begin()
        self._is_in_step = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The gradients are complete and clipped: with a guard, the last chance to have no update.

        Raises:
            DivergedError: Too many steps were refused.
        """
        self._is_in_step = False
        if self.guarded is not None:
            try:
                self.guarded.decide(gradient_norm(real_optimizer(given["optimizer"])), [given["lr_scheduler"]])
            except DivergedError as error:  # nobody else tells the monitor
                self._end(error)
                raise

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the update and before the schedule sets the next learning rate."""
        if self.monitor is not None:
            self.monitor.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The schedule has moved; the log, an evaluation and a checkpoint come next."""
        if self.guarded is not None:
            self.guarded.finish()
            state.stateful_callbacks[_GUARD] = self.guarded.state()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **given: Any) -> None:
        """The metrics of training; the lines about evaluation and about the whole run hold no `loss`."""
        if self.monitor is not None and logs is not None and "loss" in logs:
            self.monitor.log(**{name: value for name, value in _numbers(logs).items() if name not in _OF_THE_TRAINER})

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **given: Any
    ) -> None:
        """The metrics of an evaluation during training."""
        if self.monitor is not None and metrics is not None:
            values = {name.removeprefix("eval_"): value for name, value in _numbers(metrics).items() if name != "epoch"}
            self.monitor.evaluate(**values)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write what is left and close the run folder."""
        self.close()

    def _see_loss(self, model: Any, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
        loss = loss_of(output)
        if self._is_in_step and self.guarded is not None and loss is not None:
            # Told how many targets the step has in all, models divide by that, and by those of the micro-batch otherwise.
            self.guarded.add_loss(loss, is_share=named.get("num_items_in_batch") is not None)

    def _end(self, error: BaseException | None) -> None:
        self.guarded = None
        if self._loss_hook is not None:
            self._loss_hook.remove()
            self._loss_hook = None
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor.__exit__(type(error) if error is not None else None, error, None)


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a model of transformers returns, or None where the Trainer computes it elsewhere.

    Example:
        >>> import torch
        >>> loss_of({"loss": torch.tensor(0.5)}), loss_of((torch.ones(2, 3),))
        (tensor(0.5000), None)
    """
    first = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
    return first if isinstance(first, Tensor) and first.numel() == 1 else None


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
