"""Classification of films: a Transformer over tubelets (Arnab et al. 2021, arXiv:2103.15691), or convolutions in three axes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SampleKeys, SequentialBatches, ShuffledBatches, permutation
from tameformer.data.sources import digits
from tameformer.data.sources.moving_digits import MovingDigits, Target
from tameformer.models import Architecture, ConvolutionalVideoConfig, VideoConfig
from tameformer.recipes.assemble import assemble
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import class_sums, one_pass
from tameformer.record import write_figure
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

PREPROCESSING = "preprocessing.json"
NUM_SHOWN = 4
"""Films that the report shows."""


@dataclass(frozen=True, kw_only=True)
class FilmsConfig:
    """Films of the embedded digits, moving; made here, nothing is read."""

    target: Target = "direction"
    """What is to be told: the direction of the movement, the digit, or both together."""
    num_frames: int = 8
    """Frames of a film."""
    side: int = 16
    """Rows and columns of a film, in pixels."""
    slowest: float = 0.7
    """Slowest movement, in pixels a frame."""
    fastest: float = 1.4
    """Fastest movement, in pixels a frame."""
    noise: float = 0.2
    """Deviation of the noise on every pixel, where white is 1."""
    num_train_samples: int = 4000
    """Films of an epoch; each epoch has its own."""
    num_eval_samples: int = 1000
    """Films evaluated, of digits that no training film shows."""
    validation_fraction: float = 0.0
    """Share of the training digits whose films are evaluated instead of those of the test digits, to choose settings."""
    batch_size: int = 64
    """Films that one optimizer step sees, over all processes."""
    eval_batch_size: int = 250
    """Films evaluated at a time."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "num_train_samples", "num_eval_samples", "batch_size", "eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.slowest <= self.fastest:
            raise ValueError(f"expected 0 < data.slowest <= data.fastest, got {self.slowest} and {self.fastest}")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie in [0, 1), got {self.validation_fraction}")


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a classifier of films."""

    data: FilmsConfig = field(default_factory=FilmsConfig)
    """The films."""
    model: VideoConfig | ConvolutionalVideoConfig = field(default_factory=VideoConfig)
    """The classifier."""
    max_steps: int | None = 1000
    """Optimizer steps; null trains for `num_train_epochs`."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; a few of its films go to the run folder, for the report."""
    data = config.data
    train, held_out = films(data, config.order_seed)
    channels, frames, *sides = train.film_shape
    told = {"num_frames": frames, "image_size": tuple(sides), "channels": channels}
    return assemble(
        config,
        folder=folder,
        model=Architecture.of(config.model, num_classes=len(train.class_names), **told),
        source=train,
        plan=ShuffledBatches(len(train), data.batch_size, seed=config.order_seed),
        loss=film_loss,
        unit="samples",
        evaluate=partial(evaluate, source=held_out, batch_size=data.eval_batch_size, folder=folder),
        num_workers=data.num_workers,
        artifacts={PREPROCESSING: json.dumps(preprocessing(train), indent=1) + "\n"},
    )


def films(data: FilmsConfig, seed: int) -> tuple[MovingDigits, MovingDigits]:
    """Films to train on, and films of other digits."""
    shared: dict[str, Any] = {
        "num_frames": data.num_frames,
        "side": data.side,
        "speed": (data.slowest, data.fastest),
        "target": data.target,
        "noise": data.noise,
    }
    fraction = data.validation_fraction
    other = digits("validation", seed=seed, validation_fraction=fraction) if fraction else digits("test")
    return (
        MovingDigits(
            digits("train", seed=seed, validation_fraction=fraction), num_samples=data.num_train_samples, **shared
        ),
        MovingDigits(other, num_samples=data.num_eval_samples, salt="held-out films", **shared),
    )


def preprocessing(source: MovingDigits) -> dict[str, Any]:
    """How a film becomes the model's input: (film - mean) / std; and what the classes are called."""
    return {
        "film_shape": list(source.film_shape),
        "mean": list(source.digits.mean),
        "std": list(source.digits.std),
        "class_names": list(source.class_names),
    }


def film_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the films."""
    return F.cross_entropy(model(batch["films"]), batch["labels"], reduction="sum")


def evaluate(
    engine: Engine, model: nn.Module, *, source: MovingDigits, batch_size: int, folder: Path
) -> dict[str, float]:
    """Mean cross-entropy, and the share of films whose class was recognized."""
    if engine.is_main:
        write_figure(folder, "films", shown(source))
    return one_pass(engine, model, source, SequentialBatches(len(source), batch_size), measure)


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of films."""
    return class_sums(model(batch["films"]), batch["labels"])


def shown(source: MovingDigits) -> dict[str, Any]:
    """A few films frame by frame, as a figure of the report."""
    order = permutation(len(source), seed=0, epoch=0, salt="shown")[:NUM_SHOWN]
    batch = source.fetch(SampleKeys(0, 0, order))
    pictures = (batch["films"][:, 0] * source.digits.std[0] + source.digits.mean[0]).clamp(0, 1) * 255
    names = [source.class_names[label] for label in batch["labels"].tolist()]
    return {
        "kind": "images",
        "title": "Films that are evaluated",
        "caption": "Frame by frame from left to right; beside them their classes.",
        "rows": {
            f"{number}: {name}": film.round().int().tolist()
            for number, (name, film) in enumerate(zip(names, pictures, strict=True), start=1)
        },
    }
