"""Classes of sets: images as points without an order, by a model that does not know one (Lee et al. 2018, arXiv:1810.00825).

The points are real vectors, or with `model.elements tokens` members of a vocabulary. For texts as multisets of their tokens see
`model.architecture set` of the recipe text-classification.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches, Source
from tameformer.data.point_sets import PointSets, TokenSets
from tameformer.models import Architecture
from tameformer.models.set import SetConfig
from tameformer.recipes.assemble import assemble
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import class_sums, one_pass
from tameformer.recipes.vision import PREPROCESSING, VisionDataConfig, preprocessing, sources
from tameformer.training import Engine, Run
from tameformer.training.step import Batch


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a classifier of sets."""

    data: VisionDataConfig = field(default_factory=VisionDataConfig)
    """Images, whose pixels become points."""
    model: SetConfig = field(default_factory=SetConfig)
    """The classifier."""
    max_points: int = 256
    """Points of a set at most: the brightest pixels of an image."""
    levels: int = 4
    """Levels of brightness that tokens tell apart, each at each pixel another token; read with model.elements tokens only."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_points", "levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self.data, name):
                raise ValueError(f"data.{name} mixes images, and sets of points cannot be mixed so; give 0")


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes."""
    data = config.data
    images, judged = sources(data, config.order_seed)
    if config.model.elements == "tokens":
        train, held_out = (TokenSets(source, config.max_points, config.levels) for source in (images, judged))
        input_size = train.vocab_size
    else:
        train, held_out = (PointSets(source, config.max_points) for source in (images, judged))
        input_size = train.width
    return assemble(
        config,
        folder=folder,
        model=Architecture(
            "set_classifier", config.model, {"input_size": input_size, "num_classes": images.num_classes}
        ),
        source=train,
        plan=ShuffledBatches(len(train), data.batch_size, seed=config.order_seed),
        loss=set_loss,
        unit="samples",
        evaluate=partial(evaluate, source=held_out, batch_size=data.eval_batch_size),
        num_workers=data.num_workers,
        artifacts={PREPROCESSING: json.dumps(preprocessing(images), indent=1) + "\n"},
        mask=lambda batch: {"encoder": batch["real"]},
    )


def set_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the sets."""
    return F.cross_entropy(model(batch["elements"], real=batch["real"]), batch["labels"], reduction="sum")


def evaluate(engine: Engine, model: nn.Module, *, source: Source, batch_size: int) -> dict[str, float]:
    """Mean cross-entropy, and the share of sets whose class was recognized."""
    return one_pass(engine, model, source, SequentialBatches(len(source), batch_size), measure)


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over a batch of sets."""
    return class_sums(model(batch["elements"], real=batch["real"]), batch["labels"])
