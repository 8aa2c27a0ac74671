"""The part of building a run that every task shares: from source, plan and model to what the loop is handed."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from tameformer.data import FirstBatches, Plan, Source, stream
from tameformer.errors import ConfigError
from tameformer.nn.attention import set_compute_dtype
from tameformer.optim import optimizers, schedule
from tameformer.recipes.config import RecipeConfig
from tameformer.stabilizers import METHODS, stabilize
from tameformer.training import Run
from tameformer.training.run import Evaluation
from tameformer.training.step import Loss

Model = TypeVar("Model", bound=nn.Module)


def num_steps(config: RecipeConfig, plan: Plan) -> int:
    """Optimizer steps in the run."""
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_train_epochs is not None, "checked by RecipeConfig"
    return sum(plan.steps_in_epoch(epoch) for epoch in range(config.num_train_epochs))


def seeded(seed: int, build: Callable[[], Model]) -> Model:
    """A model whose weights depend on the seed alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def assemble(
    config: RecipeConfig,
    *,
    model: nn.Module,
    source: Source,
    plan: Plan,
    loss: Loss,
    unit: str,
    evaluate: Evaluation | None,
    test: Evaluation | None = None,
    num_workers: int = 0,
    artifacts: Mapping[str, str] | None = None,
) -> Run:
    """A run from a task's parts.

    Raises:
        ConfigError: A schedule that does not fit the run, such as a warm-up that is longer.
    """
    if config.overfit_batches is not None:
        plan = FirstBatches(plan, config.overfit_batches)
    max_steps = num_steps(config, plan)
    try:
        rates = schedule(config.optim, total_steps=max_steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for name in config.stabilize:  # before the optimizers exist, so that new parameters reach them
        on_loss = METHODS[name].on_loss
        if on_loss is None:
            stabilize(model, name)
        else:  # evaluation has its own, plain loss
            loss = on_loss(loss)
    # Everything outside the layers is an embedding, a stem or an output head.
    updated_by = optimizers(model, config.optim, is_hidden=lambda name: ".layers." in name)
    return Run(
        model=model,
        loss=loss,
        batches=partial(
            stream,
            source,
            plan,
            accumulation=config.gradient_accumulation_steps,
            num_workers=num_workers,
            pin_memory=torch.accelerator.is_available(),
        ),
        plan=plan,
        optimizers=updated_by,
        schedule=rates,
        max_steps=max_steps,
        unit=unit,
        max_grad_norm=config.optim.max_grad_norm,
        ema_decay=config.optim.ema_decay,
        evaluate=evaluate,
        test=test,
        artifacts=artifacts or {},
        watch=config.probes.watch(model, updated_by, logging_steps=config.loop.logging_steps, last_step=max_steps),
        set_attention_dtype=partial(set_compute_dtype, model),
        seed=config.seed,
        loop=config.loop,
        checkpoint=config.checkpoint,
    )


def require_path(path: str | None, what: str) -> str:
    """The path of the data.

    Raises:
        ConfigError: None was given.
    """
    if path is None:
        raise ConfigError(f"this recipe needs {what}: give --data.path PATH")
    return path
