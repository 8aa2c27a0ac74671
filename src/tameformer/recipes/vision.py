"""Image classification with a Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import ShuffledBatches, single_pass
from tameformer.data.sources import ArraySource, digits
from tameformer.models.vision import VisionConfig, vision_classifier
from tameformer.recipes.assemble import assemble, seeded
from tameformer.recipes.config import RecipeConfig
from tameformer.train import Engine, Run, mean_metrics
from tameformer.train.step import Batch


@dataclass(frozen=True, kw_only=True)
class VisionDataConfig:
    """Images and their classes."""

    source: Literal["digits", "npz", "folder", "hub"] = "digits"
    """`digits` is embedded; `npz` reads arrays x and y, `folder` one folder of images a class, `hub` a Hugging Face set."""
    path: str | None = None
    """File, folder or name of the data; the embedded digits need none."""
    batch_size: int = 64
    """Images that one optimizer step sees, over all processes."""
    eval_batch_size: int = 256
    """Images evaluated at a time."""
    validation_fraction: float = 0.0
    """Share of the training images that is held out and evaluated instead of the test images, to choose settings."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of an image classifier."""

    data: VisionDataConfig = field(default_factory=VisionDataConfig)
    """Images and their classes."""
    model: VisionConfig = field(default_factory=VisionConfig)
    """The classifier."""
    label_smoothing: float = 0.0
    """Probability mass of a label that is spread over all classes."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes."""
    train, held_out = sources(config)
    model = seeded(
        config.seed,
        lambda: vision_classifier(
            config.model,
            num_classes=train.num_classes,
            image_size=train.image_shape[1:],
            channels=train.image_shape[0],
        ),
    )
    return assemble(
        config,
        model=model,
        source=train,
        plan=ShuffledBatches(len(train), config.data.batch_size, seed=config.order_seed),
        loss=partial(classification_loss, label_smoothing=config.label_smoothing),
        unit="samples",
        evaluate=partial(evaluate, source=held_out, batch_size=config.data.eval_batch_size),
        num_workers=config.data.num_workers,
    )


def sources(config: Config) -> tuple[ArraySource, ArraySource]:
    """Training images, and those that are evaluated."""
    data = config.data
    held_out = "validation" if data.validation_fraction else "test"
    split = partial(digits, seed=config.order_seed, validation_fraction=data.validation_fraction)
    return split("train"), split(held_out)


def classification_loss(model: nn.Module, batch: Batch, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the images; labels are class numbers or, when mixed, probabilities."""
    return F.cross_entropy(model(batch["images"]), batch["labels"], reduction="sum", label_smoothing=label_smoothing)


def evaluate(engine: Engine, model: nn.Module, *, source: ArraySource, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy, and the share of images whose class was recognized."""
    batches = single_pass(source, batch_size, rank=engine.rank, world_size=engine.world_size)
    return mean_metrics(engine, model, batches, measure)


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of images."""
    logits = model(batch["images"]).float()
    return {
        "loss": F.cross_entropy(logits, batch["labels"], reduction="sum"),
        "accuracy": (logits.argmax(-1) == batch["labels"]).sum(),
    }
