"""The precision of a run: the one that is asked for, or the fastest on its first batch."""

from collections.abc import Sequence

import torch

from tameformer.recipes.catalogue import Recipe, with_values
from tameformer.training import Engine, Run
from tameformer.training.memory import Batch, in_parts, is_out_of_memory, num_rows
from tameformer.training.precision import PRECISIONS, candidates, fastest


def settle_precision(recipe: Recipe, run: Run, engine: Engine) -> tuple[Recipe, dict[str, float]]:
    """Set the engine's precision; `auto` becomes the name of the fastest, timed on the first batch.

    Before the first step: there are no gradients afterwards either, and weights and the random state are as they were.
    """
    name, timings = recipe.config.precision, {}
    if name == "auto":
        names = candidates(engine.device)
        if len(names) > 1:
            name, timings = _fastest_that_fits(names, run, engine)
            name = engine.gather([name])[0]  # all processes do as the first
        else:
            name = names[0]
    _set_precision(name, run, engine)
    return with_values(recipe, precision=name), timings


def _set_precision(name: str, run: Run, engine: Engine) -> None:
    engine.autocast_dtype = PRECISIONS[name].autocast_dtype
    run.set_attention_dtype(PRECISIONS[name].attention_dtype)


def _fastest_that_fits(names: Sequence[str], run: Run, engine: Engine) -> tuple[str, dict[str, float]]:
    """As `fastest`, on a part of the first micro-batch that memory suffices for; the run will find its parts itself."""
    stream = run.batches(start=0, stop=1, rank=engine.rank, world_size=engine.world_size)
    batch, parts = next(iter(stream))[0], 1
    while True:
        try:
            return fastest(names, _rehearsal(run, engine, in_parts(batch, parts)[0]))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or parts >= num_rows(batch):
                raise
        parts *= 2


def _rehearsal(run: Run, engine: Engine, batch: Batch):
    """Forward and backward of one micro-batch in the precision named."""
    batch = engine.place(batch)
    run.model.to(engine.device).train()

    def run_once(name: str) -> None:
        _set_precision(name, run, engine)
        with torch.random.fork_rng(devices=[]):
            with engine.autocast():
                loss = run.loss(run.model, batch)
            loss.backward()
        for parameter in run.model.parameters():
            parameter.grad = None

    return run_once
