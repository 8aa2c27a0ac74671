"""The part of building a run that every task shares: from source, plan and model to what the loop is handed."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from tameformer.data import FirstBatches, Plan, SampleKeys, Source, stream
from tameformer.errors import ConfigError
from tameformer.health import Policy
from tameformer.models import Architecture
from tameformer.nn.attention import set_compute_dtype
from tameformer.optim import OptimConfig, clip, for_batch_size, optimizers, schedule, warmup_steps
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.stabilize import PROFILE, apply_methods
from tameformer.record import CHECKPOINTS
from tameformer.stabilizers.shortcut_profile import Masks, real_tokens
from tameformer.tensors import pins
from tameformer.training import Run
from tameformer.training.average import averaged
from tameformer.training.run import Evaluation
from tameformer.training.sharding import share_out
from tameformer.training.step import Batch, Loss

Built = TypeVar("Built")
ARCHITECTURE = "model.json"
"""In the run folder: what its model is built from."""


def num_steps(config: RecipeConfig, plan: Plan) -> int:
    """Optimizer steps in the run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_train_epochs is not None, "checked by RecipeConfig"
    return sum(plan.steps_in_epoch(epoch) for epoch in range(config.num_train_epochs))


def seeded(seed: int, build: Callable[[], Built]) -> Built:
    """What is built, such as a model, with weights that depend on the seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def assemble(
    config: RecipeConfig,
    *,
    model: Architecture | nn.Module,
    source: Source,
    plan: Plan,
    loss: Loss,
    unit: str,
    evaluate: Evaluation | None,
    folder: Path | None = None,
    test: Evaluation | None = None,
    num_workers: int = 0,
    artifacts: Mapping[str, str] | None = None,
    mask: Callable[[Batch], Masks] = real_tokens,
    trivial_loss: float | None = None,
) -> Run:
    """A run from a task's parts.

    Args:
        config: The configuration.
        model: What it is built from, with the run's seed; that goes into the run folder, and `tame export` needs it. Or a
            fresh module.
        source: Training data.
        plan: Its order.
        loss: The loss of a batch, summed over its targets.
        unit: What `num_items` counts.
        evaluate: Metrics during the run.
        folder: The run folder; what a profile gave is taken from there again once it holds a checkpoint.
        test: Metrics once, at the end.
        num_workers: Processes that prepare batches ahead.
        artifacts: Text files for the run folder.
        mask: From a batch to True at real tokens, by side, for methods that profile the model.
        trivial_loss: That of predicting frequencies only (`tameformer.health.prior_loss`), against which a stall is told.

    Raises:
        ConfigError: A schedule that does not fit the run, such as a warm-up that is longer; settings of a method that do not
            fit the model.
        PatchError: A method that does not fit the model.
    """
    warnings = config.detectors
    if config.overfit_batches is not None:
        plan = FirstBatches(plan, config.overfit_batches)
        warnings = replace(warnings, over_fitting=None)  # it is what was asked for
    max_steps, optim = num_steps(config, plan), _for_batch_size(config)
    try:
        rates = schedule(config.optim, total_steps=max_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    kept: dict[str, Any] = {}
    if isinstance(model, Architecture):
        kept[ARCHITECTURE], model = model.to_plain(), seeded(config.seed, model.build)
    batches = partial(stream, source, plan, accumulation=config.gradient_accumulation_steps)
    # Before the optimizers exist, so that new parameters reach them.
    loss, profiled = _stabilized(config, model, loss, partial(_first_step, model, batches), mask, folder)
    if profiled:
        kept[PROFILE] = profiled
    texts = {name: json.dumps(values, indent=1) + "\n" for name, values in kept.items()}
    average = None if config.optim.ema_decay is None else averaged(model, config.optim.ema_decay)
    models = [model] if average is None else [model, average.module]
    if config.fsdp and PartialState().num_processes > 1:  # before the optimizers, too: they hold this process's parts
        for one in models:
            share_out(one, device=cast(torch.device, PartialState().device))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # Everything outside the layers is an embedding, a stem or an output head.
    updated_by = optimizers(model, optim, is_hidden=lambda name: ".layers." in name)
    return Run(
        model=model,
        loss=loss,
        batches=partial(batches, num_workers=num_workers, pin_memory=pins(accelerator)),
        plan=plan,
        optimizers=updated_by,
        schedule=rates,
        max_steps=max_steps,
        unit=unit,
        clip=clip(updated_by, config.optim),
        average=average,
        evaluate=evaluate,
        test=test,
        artifacts={**(artifacts or {}), **texts},
        guard=Policy(config.guard),
        detectors=warnings.build(
            trivial_loss=trivial_loss,
            stalled_after=warmup_steps(config.optim, total_steps=max_steps) + max(100, max_steps // 10),
        ),
        watch=config.probes.watch(model, updated_by, logging_steps=config.loop.logging_steps, last_step=max_steps),
        set_attention_dtype=partial(_set_attention_dtype, models),
        seed=config.seed,
        loop=config.loop,
        checkpoint=config.checkpoint,
    )


def _stabilized(
    config: RecipeConfig,
    model: nn.Module,
    loss: Loss,
    batches: Callable[[], list[Batch]],
    mask: Callable[[Batch], Masks],
    folder: Path | None,
) -> tuple[Loss, dict[str, Any]]:
    """Apply the methods that the configuration names; returns the loss from now on, and what profiles gave."""
    try:
        _, loss, profiled = apply_methods(
            model, config.methods, loss, batches=batches, mask=mask, profiled=read_profile(folder)
        )
    except ValueError as error:
        raise ConfigError(f"stabilize: {error}") from error
    return loss, profiled


def _for_batch_size(config: RecipeConfig) -> OptimConfig:
    """The rates for the batches that the recipe's `data` section asks for."""
    if config.optim.base_batch_size is None:
        return config.optim
    data = getattr(config, "data", None)
    for name in ("batch_size", "max_tokens", "max_frames"):
        if isinstance(value := getattr(data, name, None), int):
            return for_batch_size(config.optim, value)
    raise ConfigError(
        "optim.base_batch_size scales rates by data.batch_size, which this recipe does not have; leave it out"
    )


def _set_attention_dtype(models: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
    for model in models:
        set_compute_dtype(model, dtype)


def frequencies(source: Source, num_classes: int, *, most: int = 256) -> np.ndarray:
    """How often each token is a target, in samples from all over the source; the loss of who knows only that is trivial."""
    indices = np.linspace(0, len(source) - 1, min(len(source), most)).astype(np.int64)  # pyright: ignore[reportArgumentType]
    targets = source.fetch(SampleKeys(0, 0, indices))["targets"].flatten()
    return np.bincount(targets[targets >= 0].numpy(), minlength=num_classes)


def _first_step(model: nn.Module, batches: Callable[..., Any]) -> list[Batch]:
    """This process's micro-batches of the first step, where the model is from now on."""
    state = PartialState()
    model.to(state.device)
    with closing(batches(start=0, stop=1, rank=state.process_index, world_size=state.num_processes)) as steps:
        found = next(steps)
    return [
        {key: value.to(state.device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        for batch in found
    ]


def read_profile(folder: Path | None) -> dict[str, Any]:
    """What profiles gave when the run began; nothing where no folder holds a checkpoint yet."""
    if folder is None:
        return {}
    file = folder / PROFILE
    began = (folder / CHECKPOINTS).is_dir() and file.is_file()
    return json.loads(file.read_text(encoding="utf-8")) if began else {}


def require_path(path: str | None, what: str) -> str:
    """The path of the data.

    Raises:
        ConfigError: None was given.
    """
    if path is None:
        raise ConfigError(f"this recipe needs {what}: give --data.path PATH")
    return path
