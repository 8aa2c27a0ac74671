"""From a recipe to a finished run folder: build, resume, train, report."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tameformer import report
from tameformer.errors import RecordError
from tameformer.recipes.catalogue import Recipe, resolve, with_values
from tameformer.recipes.precision import settle_precision
from tameformer.recipes.resume import check_drift, choose_folder, find_checkpoint, stored_values
from tameformer.record import CONFIG, ENVIRONMENT, LOG, RunReader, RunWriter, write_atomically
from tameformer.tensors import local_part
from tameformer.training import CheckpointFolder, Engine, Listener, Listeners, Loop, Run, StopRequest
from tameformer.training import checkpoint as checkpoints_on_disk
from tameformer.training.deterministic import deterministic_kernels
from tameformer.training.environment import environment
from tameformer.training.faults import Fault, Faults, parse
from tameformer.training.listeners import RecordListener, TensorBoardListener
from tameformer.training.sharding import is_shared_out
from tameformer.training.watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """What a training run gave."""

    folder: Path
    """The run folder."""
    step: int
    """Steps completed."""
    finished: bool
    """False when it paused, or a signal stopped it, after a save; resume it with `resume="auto"`."""
    metrics: Mapping[str, float]
    """The last value of every metric, by slash-separated key."""
    exit_code: int
    """0 when finished or paused, or 128 + the number of the signal that stopped the run."""


def train(
    recipe: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: str = "never",
    listeners: Sequence[Listener] = (),
    inject: str = "",
) -> Result:
    """Train from a recipe.

    Args:
        recipe: A name that `tame recipes` lists, or the path of a YAML file.
        overrides: Changes by key, such as `{"optim.peak_lr": 3e-4}`.
        resume: "never" starts anew, "auto" continues the run folder where it stands or starts anew, anything else is
            the path of a checkpoint.
        listeners: Told of everything that happens.
        inject: Faults to rehearse, such as "nan@120,kill@400" (`tameformer.training.faults`); no part of the configuration.

    Returns:
        The run folder and the last metrics.

    Raises:
        ConfigError: Unknown key, bad value, or a run folder that belongs to another configuration.
        DataError: Data that cannot be trained on.
        DivergedError: The guard could not bring the run back; its last checkpoint is sound.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> result = train("vit-digits", overrides={"max_steps": 5, "output_dir": folder})
        >>> result.step, sorted(key for key in result.metrics if key.startswith("eval/"))
        (5, ['eval/accuracy', 'eval/loss'])
    """
    return launch(resolve(recipe, overrides), resume=resume, listeners=listeners, inject=inject)


def launch(
    recipe: Recipe,
    *,
    resume: str = "never",
    listeners: Sequence[Listener] = (),
    inject: str = "",
    on_hang: Callable[[], object] = lambda: None,
) -> Result:
    """As `train`, for a configuration that is complete already; `on_hang` is called when no batch comes any more."""
    with deterministic_kernels(recipe.config.deterministic):
        return _launch(recipe, resume, listeners, parse(inject), on_hang)


def _launch(
    recipe: Recipe,
    resume: str,
    listeners: Sequence[Listener],
    planned: Sequence[Fault],
    on_hang: Callable[[], object],
) -> Result:
    engine = Engine()
    folder = Path(engine.gather([str(choose_folder(recipe, resume)) if engine.is_main else None])[0])
    listener = Listeners(*(listeners if engine.is_main else ()))
    spent = _struck(folder) if planned and resume != "never" else []
    early: list[tuple[int, str, str, Mapping[str, Any]]] = []  # told before there is a record
    faults = Faults(planned, rank=engine.rank, tell=lambda *told: early.append(told), spent=spent)
    if engine.is_main:
        faults.at_resume(folder)
    engine.wait()
    faults.tell = listener.on_event
    checkpoint, skipped = find_checkpoint(folder, resume)
    drift = check_drift(folder, recipe) if checkpoint is not None else []
    if checkpoint is not None and recipe.config.precision == "auto":
        recipe = with_values(recipe, precision=stored_values(folder)["precision"])
    run: Run = recipe.build(recipe.config, folder)
    recipe, timings = settle_precision(recipe, run, engine)

    keep_last = recipe.config.checkpoint.keep_last
    checkpoints = CheckpointFolder(folder, keep_last=keep_last, before_publish=faults.at_save)
    with StopRequest() as stop:
        loop = Loop(faults.install(run) if planned else run, engine, checkpoints, listener, stop)
        if checkpoint is not None:
            loop.restore(checkpoints_on_disk.load(checkpoint))
        # Nothing was written until here: what is refused leaves the folder as it was.
        if engine.is_main:
            _write_head(folder, recipe, run, engine)
            resume_step = None if checkpoint is None else loop.step
            writer = RunWriter(folder, resume_step=resume_step)
            listener.put_first(RecordListener(writer), TensorBoardListener(folder, resume_step=resume_step))
        try:
            for kind, message, details in _opening_events(run, recipe, timings, checkpoint, skipped, drift):
                listener.on_event(loop.step, kind, message, details)
            for told in early:
                listener.on_event(*told)
            for text in spent:  # said again, because a run without a checkpoint starts its record anew
                listener.on_event(loop.step, "injected", f"{text} has struck before", {"fault": text})
            with Watchdog(
                engine,
                folder,
                timeout=recipe.config.loop.hang_timeout,
                tell=lambda message, details: listener.on_event(loop.step, "hang", message, details),
                then=on_hang,
                grace=5.0 if engine.world_size > 1 else 1.0,
            ):
                outcome = loop.train()
        finally:
            listener.on_train_end(loop.step)
            if engine.is_main:
                _write_report(folder)
    interrupted = outcome.status == "running"
    # A signal may have come to one process only; all have stopped for it, and all say so. Without one the run has paused.
    signalled = max(engine.gather([0 if stop.signal_number is None else stop.exit_code]))
    exit_code = signalled if interrupted else 0
    return Result(folder, outcome.step, not interrupted, outcome.metrics, exit_code)


def _struck(folder: Path) -> list[str]:
    """The faults that were injected into the run in this folder."""
    events = RunReader(folder).events() if (folder / LOG).is_file() else []
    return list(dict.fromkeys(str(event["fault"]) for event in events if event.get("kind") == "injected"))


def _write_report(folder: Path) -> None:
    """The report, or a word about why there is none: how the run ended counts for more."""
    try:
        report.write_report(folder)
    except (OSError, RecordError) as error:
        text = "the report was not written: %s; mend that, then `tame report %s` writes it"
        logging.getLogger(__name__).warning(text, error, folder)


def _write_head(folder: Path, recipe: Recipe, run: Run, engine: Engine) -> None:
    """Write what is known before the first step: configuration, environment, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in run.artifacts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_atomically(folder / name, text)
    write_atomically(folder / CONFIG, recipe.to_yaml())
    described = environment(world_size=engine.world_size)
    write_atomically(folder / ENVIRONMENT, json.dumps(described, indent=1, ensure_ascii=False) + "\n")


def _shared_out(model: nn.Module) -> str:
    if not is_shared_out(model):
        return "fsdp: one process, which keeps all weights; `torchrun --nproc_per_node N` starts several to share them"
    parameters = list(model.parameters())
    here, all_of_them = sum(local_part(p).numel() for p in parameters), sum(p.numel() for p in parameters)
    return f"fsdp: this process keeps {here:,} of {all_of_them:,} parameters"


def _opening_events(
    run: Run,
    recipe: Recipe,
    timings: Mapping[str, float],
    checkpoint: Path | None,
    skipped: Sequence[str],
    drift: Sequence[str],
) -> list[tuple[str, str, dict[str, Any]]]:
    """What was decided before the first step."""
    events: list[tuple[str, str, dict[str, Any]]] = []
    if checkpoint is None:
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        groups = {
            group.get("name", "all"): sum(p.numel() for p in group["params"])
            for optimizer in run.optimizers
            for group in optimizer.param_groups
        }
        told = ", ".join(f"{count:,} in group {name}" for name, count in groups.items())
        events.append(
            (
                "start",
                f"{recipe.name}: {parameters:,} parameters ({told}), {run.max_steps} steps",
                {"max_steps": run.max_steps},
            )
        )
    else:
        events.append(("resume", f"continues from {checkpoint.name}", {"max_steps": run.max_steps}))
    if recipe.config.optim.base_batch_size is not None:
        rates = sorted({group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups})
        told = ", ".join(f"{rate:.4g}" for rate in rates)
        events.append(("learning_rate", f"peak learning rate {told}, scaled to the batch size", {"peak_lr": rates}))
    if recipe.config.fsdp:
        events.append(("fsdp", _shared_out(run.model), {}))
    events += [("checkpoint_skipped", sentence, {}) for sentence in skipped]
    events += [("config_drift", f"{sentence}, from here on", {}) for sentence in drift]
    if timings:
        times = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in timings.items())
        events.append(
            ("precision", f"precision {recipe.config.precision}: fastest on the first batch ({times})", dict(timings))
        )
    elif checkpoint is None:
        events.append(("precision", f"precision {recipe.config.precision}", {}))
    return events
