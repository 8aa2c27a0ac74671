"""The measurements of `Monitor` in the Hugging Face Trainer."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tameformer.errors import missing_extra
from tameformer.health import Detectors, Monitor
from tameformer.health.monitor import Tracker
from tameformer.integrations.monitored import monitored
from tameformer.probes import Probe

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise missing_extra("transformers", "hf") from error

_OF_THE_TRAINER = {"epoch", "learning_rate"}
"""What the Trainer adds to each line: the run folder has its own words for it."""


class TameCallback(TrainerCallback):
    """Records what happens inside the model while the Trainer trains it, and changes nothing about the training.

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

    Raises:
        RecordError: When training begins at step 0 and `output_dir` holds a run already.

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
    ) -> None:
        self.detectors = detectors
        self.output_dir, self.every, self.probes, self.trackers = output_dir, every, probes, tuple(trackers)
        self.monitor: Monitor | None = None
        """What does the work, from the beginning of training on."""

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

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Before the first micro-batch of an optimizer step."""
        if self.monitor is not None:
            self.monitor.begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """After the update and before the schedule sets the next learning rate."""
        if self.monitor is not None:
            self.monitor.step()

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

    def _end(self, error: BaseException | None) -> None:
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor.__exit__(type(error) if error is not None else None, error, None)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
