"""The section `finetune` of a recipe: what is done to a model that starts from other weights, and how its layers learn."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from accelerate import PartialState
from torch import nn

from tameformer.errors import ConfigError
from tameformer.finetune import (
    GradualUnfreezing,
    Place,
    freeze,
    lora,
    mixout,
    one_by_one,
    per_neuron,
    per_weight,
    places,
    prior_decay,
    reinit_top,
    scale_rates,
)
from tameformer.patch import PatchHandle
from tameformer.stabilizers.weight_parts import weight_names
from tameformer.training import Run
from tameformer.training.run import Stream
from tameformer.training.step import Batch


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a model that starts from other weights is held to them, or let go."""

    layer_decay: float | None = None
    """Factor on the learning rate from each layer to the one below it; null lets all learn alike."""
    reinit_layers: int | None = None
    """Layers from the top that start afresh, with the last norm, pooler and head; null keeps them."""
    freeze_layers: int | None = None
    """Layers from the bottom that do not learn, with the embeddings; 0 freezes the embeddings, null nothing."""
    unfreeze_steps: int | None = None
    """Begin with the head, and let one layer more learn every so many steps, from the top; null lets all learn at once."""
    mixout: float | None = None
    """Probability that a weight is, for one pass, the one that training started from; null is off."""
    mixout_by: Literal["weight", "neuron"] = "weight"
    """Whether mixout draws for each weight or for each input neuron."""
    prior_decay: float | None = None
    """Decay toward the weights that training started from, decoupled like weight decay; null is off."""
    lora_rank: int | None = None
    """Rank of the changes that the layers learn in place of their frozen weights (extra `peft`); null is off."""

    def __post_init__(self) -> None:
        for name, least in (("reinit_layers", 0), ("freeze_layers", 0), ("unfreeze_steps", 1), ("lora_rank", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"finetune.{name} must be at least {least}, got {value}; null switches it off")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"finetune.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.mixout is not None and not 0 <= self.mixout < 1:
            raise ValueError(f"finetune.mixout must lie in [0, 1), got {self.mixout}")
        if self.prior_decay is not None and self.prior_decay < 0:
            raise ValueError(f"finetune.prior_decay must not be negative, got {self.prior_decay}")
        if self.freeze_layers is not None and self.unfreeze_steps is not None:
            raise ValueError(
                "finetune.freeze_layers freezes for good and finetune.unfreeze_steps for a while; give one"
            )
        others = ("freeze_layers", "unfreeze_steps", "mixout", "prior_decay")
        given = [name for name in others if getattr(self, name) is not None]
        if self.lora_rank is not None and given:
            raise ValueError(f"finetune.lora_rank freezes the weights of all layers; leave finetune.{given[0]} out")


def prepare(model: nn.Module, config: FinetuneConfig, *, seed: int, starts: bool) -> list[PatchHandle]:
    """What comes before the optimizers; `starts` is False where a checkpoint will bring the weights.

    Raises:
        ConfigError: More layers than there are; a PatchError says that the model has none that we find.
    """
    try:
        if config.reinit_layers is not None and starts:
            reinit_top(model, layers=config.reinit_layers, seed=seed)
        handles = [] if config.freeze_layers is None else [freeze(model, up_to=config.freeze_layers)]
    except ValueError as error:
        raise ConfigError(f"finetune: {error}") from error
    if config.mixout is not None:
        draw = per_weight if config.mixout_by == "weight" else per_neuron
        held = {place.layer for place in places(model).values() if place.below >= 0 and _is_held(place, config)}
        inside = tuple(f"{layer}." for layer in held)

        def where(name: str, module: nn.Module) -> bool:
            return name.startswith(inside) and bool(weight_names(module))

        handles.append(mixout(model, config.mixout, draw=draw, where=where))
    if config.lora_rank is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            handles.append(lora(model, rank=config.lora_rank))
    return handles


def finish(run: Run, config: FinetuneConfig) -> Run:
    """What comes after the optimizers."""
    if config.layer_decay is not None:
        scale_rates(run.model, run.optimizers, config.layer_decay)
    if config.prior_decay is not None:
        held = partial(_has_prior, config=config)
        prior_decay(run.model, run.optimizers, decay=config.prior_decay, where=held)
    if config.unfreeze_steps is not None:
        if PartialState().num_processes > 1:
            raise ConfigError(
                "finetune.unfreeze_steps does not work with several processes, which wait for every gradient; use one"
            )
        schedule = partial(one_by_one, steps_per_layer=config.unfreeze_steps)
        run = replace(run, batches=_Unfreezing(run.batches, GradualUnfreezing(run.model, schedule)))
    return run


def _is_held(place: Place, config: FinetuneConfig) -> bool:
    """Whether what is there has pretrained weights: not the head, nor what started afresh."""
    return place.above > (config.reinit_layers or 0)


def _has_prior(name: str, parameter: nn.Parameter, place: Place | None, *, config: FinetuneConfig) -> bool:
    return place is not None and _is_held(place, config)


@dataclass(frozen=True)
class _Unfreezing:
    """The stream of the data, which thaws what is due before each step's batches are handed out."""

    batches: Stream
    unfreezing: GradualUnfreezing

    def __call__(self, *, start: int, stop: int, rank: int, world_size: int) -> Iterator[Sequence[Batch]]:
        return self._steps(start, stop, rank, world_size)

    def _steps(self, start: int, stop: int, rank: int, world_size: int) -> Generator[Sequence[Batch], None, None]:
        with closing(cast(Any, self.batches(start=start, stop=stop, rank=rank, world_size=world_size))) as stream:
            for step, batches in enumerate(stream, start=start):
                self.unfreezing.at(step)
                yield batches
