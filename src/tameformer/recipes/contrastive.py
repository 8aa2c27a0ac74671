"""Self-supervised images: tell two views of an image from all others (Chen et al. 2020, "SimCLR", arXiv:2002.05709).

`tame train vit --init_from RUN` goes on with the encoder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches
from tameformer.data.views import TwoViews
from tameformer.errors import ConfigError
from tameformer.models import Architecture
from tameformer.models.contrastive import ContrastiveConfig
from tameformer.nn.nt_xent import gather_rows, nt_xent
from tameformer.recipes.assemble import assemble
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import joined, one_pass
from tameformer.recipes.linear_probe import check_probe, linear_probe
from tameformer.recipes.vision import (
    PREPROCESSING,
    VisionDataConfig,
    check_unlabelled,
    preprocessing,
    sources,
)
from tameformer.training import Engine, Run
from tameformer.training.step import Batch


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of an encoder by comparison."""

    data: VisionDataConfig = field(default_factory=lambda: VisionDataConfig(augment=("resized_crop", "flip")))
    """Images, and how two views of one differ; their classes serve the linear probe alone."""
    model: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Encoder and projection."""
    temperature: float = 0.2
    """Divides the similarities; lower cares more for the hardest comparisons."""
    linear_probe_samples: int | None = 2000
    """Labelled training images that a linear probe of the encoder learns from at each evaluation; null for no probe."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unlabelled(self.data)
        check_probe(self.linear_probe_samples)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"an image is compared with all others of its batch, which cannot be cut into parts: expected "
                f"gradient_accumulation_steps 1, got {self.gradient_accumulation_steps}; take a smaller data.batch_size"
            )


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes."""
    data = config.data
    processes = PartialState().num_processes
    if data.batch_size % processes or data.batch_size < 2:
        raise ConfigError(
            f"data.batch_size is {data.batch_size}; expected at least 2 images, equally many on each of the {processes} "
            "process(es): an image is compared with all others"
        )
    train, held_out = sources(data, config.order_seed)
    try:
        source, judged = TwoViews(train), TwoViews(replace(held_out, transforms=train.transforms))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    channels, *sides = train.image_shape
    return assemble(
        config,
        folder=folder,
        model=Architecture("contrastive_encoder", config.model, {"image_size": tuple(sides), "channels": channels}),
        source=source,
        plan=ShuffledBatches(len(train), data.batch_size, seed=config.order_seed),
        loss=partial(comparison_loss, temperature=config.temperature),
        unit="samples",
        evaluate=joined(
            partial(evaluate, source=judged, batch_size=data.eval_batch_size, temperature=config.temperature),
            linear_probe(
                config.linear_probe_samples,
                train,
                held_out,
                seed=config.order_seed,
                batch_size=data.eval_batch_size,
            ),
        ),
        num_workers=data.num_workers,
        artifacts={PREPROCESSING: json.dumps(preprocessing(train), indent=1) + "\n"},
    )


def comparison_loss(model: nn.Module, batch: Batch, *, temperature: float) -> Tensor:
    """NT-Xent summed over this process's images, each compared with the images of all processes."""
    first, second = model(batch["images"]).chunk(2)
    return nt_xent(first, second, temperature=temperature, gather=gather_rows, rank=PartialState().process_index)


def evaluate(
    engine: Engine,
    model: nn.Module,
    *,
    source: TwoViews,
    batch_size: int,
    temperature: float,
) -> dict[str, float]:
    """The loss and the share of views that find their image among `batch_size`."""
    plan = SequentialBatches(len(source), batch_size)
    # A process may have a batch fewer than another, so that nothing is gathered: images are compared within their batch.
    return one_pass(engine, model, source, plan, partial(measure, temperature=temperature))


def measure(model: nn.Module, batch: Batch, *, temperature: float) -> Mapping[str, Tensor]:
    """Sums over a batch of images."""
    first, second = model(batch["images"]).chunk(2)
    similar = nn.functional.normalize(first, dim=-1) @ nn.functional.normalize(second, dim=-1).T
    found = similar.argmax(1) == torch.arange(len(first), device=first.device)
    return {"loss": nt_xent(first, second, temperature=temperature), "matching_accuracy": found.sum()}
