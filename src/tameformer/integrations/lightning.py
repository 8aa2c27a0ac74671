"""The measurements of `Monitor`, and the guard, in the Trainer of Lightning."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.errors import missing_extra
from tameformer.health import Detectors, GuardConfig, Monitor
from tameformer.health.monitor import Tracker
from tameformer.integrations.guarded import GuardedSteps, gradient_norm, refuse_what_cannot_be_guarded
from tameformer.integrations.monitored import monitored, real_optimizer
from tameformer.probes import Probe

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise missing_extra("lightning", "lightning") from error


class TameCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """Records what happens inside the model while Lightning trains it, and changes nothing about the training.

    With `guard` it refuses steps whose loss or gradient is not finite or a spike: weights, moments, the count behind Adam's
    bias correction and schedules of interval "step" stay as they are. Lightning counts the step. When too many are refused,
    `fit` ends with a `DivergedError`; going back to a checkpoint is not for a callback to do.

    Works in the Trainers of `lightning` and of `pytorch_lightning`. A step is a batch after which an optimizer has stepped:
    several batches where gradients are accumulated, one where several optimizers step by hand.

    Args:
        output_dir: The run folder; None is `tame` in the Trainer's `default_root_dir`, or `tame-2` where `tame` holds a run.
        model: Name of the submodule of the LightningModule whose call is the forward pass, such as "model"; None takes the
            only submodule with parameters, or the LightningModule itself where there are several.
        every: Optimizer steps from one measurement to the next, and from one line of the log to the next.
        probes: Probes with a cadence each; None takes `tameformer.probes.default_probes` at `every`.
        trackers: Called with the step and the measurements of each line, see `tameformer.integrations.trackers`.
        detectors: Builds what is warned of, for each training anew, such as `tame.DetectorsConfig(data_wait=None).build`.
        guard: When steps are refused, such as `tame.GuardConfig()`; None refuses none. The gradient is judged before clipping.

    Raises:
        RecordError: When training begins at step 0 and `output_dir` holds a run already.
        ValueError: When training begins and there is no submodule of that name; with `guard` under fp16, DeepSpeed or several
            optimizers.

    Example:
        >>> TameCallback("runs/vit", model="net.encoder").model
        'net.encoder'
    """

    def __init__(
        self,
        output_dir: str | Path | None = None,
        *,
        model: str | None = None,
        every: int = 10,
        probes: Sequence[tuple[Probe, int]] | None = None,
        trackers: Sequence[Tracker] = (),
        detectors: Callable[[], Detectors] = Detectors,
        guard: GuardConfig | None = None,
    ) -> None:
        self.detectors, self.guard = detectors, guard
        self.output_dir, self.model, self.every, self.probes = output_dir, model, every, probes
        self.trackers = tuple(trackers)
        self.monitor: Monitor | None = None
        """What does the work, from the beginning of training on."""
        self.guarded: GuardedSteps | None = None
        """What refuses steps, from the beginning of training on."""
        self._guard_state: dict[str, Any] | None = None
        self.steps_done = 0
        self._global_step = 0  # Lightning counts the steps of every optimizer
        self._loss: Tensor | None = None
        self._norms: list[Tensor] = []
        self._rate = 0.0
        self._before: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and what the guard knows, for checkpoints."""
        state = self._guard_state if self.guarded is None else self.guarded.state()
        return {"steps_done": self.steps_done, **({} if state is None else {"guard": state})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the steps of a checkpoint."""
        self.steps_done, self._guard_state = state_dict["steps_done"], state_dict.get("guard")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the run folder, or continue it where a checkpoint is resumed."""
        self._end(InterruptedError("training began anew"))
        self._global_step = trainer.global_step
        self.steps_done = (self.steps_done or self._global_step) if self._global_step else 0
        self._forget()
        if self.guard is not None:
            strategy, plugin = type(trainer.strategy).__name__, trainer.precision_plugin
            refuse_what_cannot_be_guarded(
                scales_loss=getattr(plugin, "scaler", None) is not None, is_deepspeed="DeepSpeed" in strategy
            )
            if len(trainer.optimizers) != 1:
                raise ValueError(
                    f"guard needs one optimizer, got {len(trainer.optimizers)}: a step refused of one alone would take "
                    f"them apart; use tameformer.Guard in training_step"
                )
        self.monitor = monitored(
            watched_module(pl_module, self.model),
            trainer.optimizers,
            output_dir=self.output_dir,
            default_dir=Path(trainer.default_root_dir) / "tame",
            start_step=self.steps_done,
            every=self.every,
            probes=self.probes,
            trackers=self.trackers,
            detectors=self.detectors(),
        )
        if self.guard is not None:
            self.guarded = GuardedSteps(
                pl_module,
                real_optimizer(trainer.optimizers[0]),
                output_dir=self.monitor.folder,
                config=self.guard,
                steps_done=self.steps_done,
                state=self._guard_state if self.steps_done else None,
            )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before the forward pass; the first one of a step is watched."""
        if self.monitor is not None:
            self.monitor.begin()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """The loss of a batch, divided by the number of batches that are accumulated."""
        if self.guarded is not None:
            self.guarded.add_loss(loss.reshape(()))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """The gradients are complete and not clipped yet, and the learning rate is the one of this step.

        Raises:
            DivergedError: With a guard, too many steps were refused.
        """
        is_logged = self.monitor is not None and (self.steps_done + 1) % self.monitor.logging_steps == 0
        norm = gradient_norm(optimizer) if is_logged or self.guarded is not None else None
        if self.guarded is not None and norm is not None:
            moved = [each.scheduler for each in trainer.lr_scheduler_configs if each.interval == "step"]
            self.guarded.decide(norm, moved)
        if is_logged and norm is not None:
            self._norms.append(norm)
            self._rate = max(self._rate, *(float(group["lr"]) for group in optimizer.param_groups))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The batch is done, and with it the step if an optimizer has stepped."""
        if self.guarded is not None:
            self.guarded.finish()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):  # divided by the number of batches that are accumulated
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        if self.monitor is not None:
            metrics: dict[str, Any] = {}
            if self._norms:
                metrics = {"grad_norm": torch.linalg.vector_norm(torch.stack(self._norms)), "lr": self._rate}
            self.monitor.step(loss=self._loss, **metrics)
        self.steps_done += 1  # in every process, so that all take part in the next norm
        self._forget()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember the metrics so far: what is new at the end was measured here."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The metrics of a validation during training; the sanity check is none."""
        new = {name: value for name, value in trainer.callback_metrics.items() if self._before.get(name) is not value}
        self._before = {}
        if self.monitor is not None and new and not trainer.sanity_checking:
            self.monitor.evaluate(**{validation_name(name): float(value) for name, value in new.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is left and close the run folder."""
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take everything off the model and say in the run folder why it ends."""
        self._end(exception)

    def _end(self, error: BaseException | None) -> None:
        if self.guarded is not None:  # a checkpoint may yet be written
            self._guard_state, self.guarded = self.guarded.state(), None
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor.__exit__(type(error) if error is not None else None, error, None)

    def _forget(self) -> None:
        self._loss, self._norms, self._rate = None, [], 0.0


def watched_module(module: nn.Module, name: str | None) -> nn.Module:
    """The submodule called `name`; for None the only one with parameters, or the module itself where there are several.

    Lightning calls `training_step`, not the LightningModule, and a forward pass is seen where a module is called.

    Raises:
        ValueError: There is no submodule of that name.

    Example:
        >>> watched_module(nn.ModuleDict({"model": nn.Linear(2, 2), "loss": nn.MSELoss()}), None)
        Linear(in_features=2, out_features=2, bias=True)
    """
    if name is not None:
        try:
            return module.get_submodule(name)
        except AttributeError as error:
            names = ", ".join(child for child, _ in module.named_children())
            raise ValueError(f"model must be a submodule of {type(module).__name__} ({names}), got {name!r}") from error
    candidates = [child for child in module.children() if next(child.parameters(), None) is not None]
    return candidates[0] if len(candidates) == 1 else module


def validation_name(name: str) -> str:
    """A metric's name without the word that says where it was measured.

    Example:
        >>> [validation_name(name) for name in ("val_loss", "valid/f1", "perplexity", "value")]
        ['loss', 'f1', 'perplexity', 'value']
    """
    return re.sub("^(val|valid|validation|eval)[_/]", "", name)
