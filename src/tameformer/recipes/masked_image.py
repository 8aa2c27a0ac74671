"""Self-supervised images: predict the patches that are hidden (He et al. 2022, "Masked Autoencoders", arXiv:2111.06377).

`tame train vit --init_from RUN` goes on with the encoder.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tameformer.data import SampleKeys, SequentialBatches, ShuffledBatches
from tameformer.data.patch_masks import MaskedPatches
from tameformer.errors import ConfigError
from tameformer.models import Architecture, MaskedAutoencoderConfig
from tameformer.models.masked_autoencoder import hidden_error, patch_targets, reconstruction
from tameformer.nn.stems import grid_size
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
from tameformer.record import write_figure
from tameformer.training import Engine, Run
from tameformer.training.step import Batch

PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a masked autoencoder."""

    data: VisionDataConfig = field(default_factory=VisionDataConfig)
    """Images; their classes serve the linear probe alone."""
    model: MaskedAutoencoderConfig = field(default_factory=MaskedAutoencoderConfig)
    """Encoder and decoder."""
    mask_ratio: float = 0.75
    """Share of the patches that are hidden."""
    normalize_pixels: bool = True
    """Whether each patch to be predicted is normalized by its own mean and deviation."""
    linear_probe_samples: int | None = 2000
    """Labelled training images that a linear probe of the encoder learns from at each evaluation; null for no probe."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unlabelled(self.data)
        check_probe(self.linear_probe_samples)


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes; pictures of its reconstructions go to the run folder."""
    data, size = config.data, config.model.patch_size
    train, held_out = sources(data, config.order_seed)
    channels, *sides = train.image_shape
    rows, columns = grid_size((sides[0], sides[1]), size)
    masked = partial(MaskedPatches, num_patches=rows * columns, mask_ratio=config.mask_ratio)
    try:
        source, judged = masked(train), masked(held_out)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return assemble(
        config,
        folder=folder,
        model=Architecture("masked_autoencoder", config.model, {"image_size": tuple(sides), "channels": channels}),
        source=source,
        plan=ShuffledBatches(len(train), data.batch_size, seed=config.order_seed),
        loss=partial(reconstruction_loss, patch_size=size, normalize=config.normalize_pixels),
        unit="samples",
        evaluate=joined(
            partial(
                evaluate,
                source=judged,
                batch_size=data.eval_batch_size,
                patch_size=size,
                normalize=config.normalize_pixels,
                folder=folder,
            ),
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


def reconstruction_loss(model: nn.Module, batch: Batch, *, patch_size: int, normalize: bool) -> Tensor:
    """Mean squared error over the hidden patches of an image, summed over the images."""
    targets = patch_targets(batch["images"], patch_size, normalize=normalize)
    return hidden_error(model(batch["images"], batch["visible"]), targets, batch["visible"])


def evaluate(
    engine: Engine,
    model: nn.Module,
    *,
    source: MaskedPatches,
    batch_size: int,
    patch_size: int,
    normalize: bool,
    folder: Path,
) -> dict[str, float]:
    """Error at hidden patches of held-out images, each with one mask; some of them go to the run folder as pictures."""

    def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"loss": reconstruction_loss(model, batch, patch_size=patch_size, normalize=normalize)}

    metrics = one_pass(engine, model, source, SequentialBatches(len(source), batch_size), measure)
    if engine.is_main:
        write_pictures(engine, model, source, patch_size=patch_size, normalize=normalize, folder=folder)
    return metrics


def write_pictures(
    engine: Engine, model: nn.Module, source: MaskedPatches, *, patch_size: int, normalize: bool, folder: Path
) -> None:
    """What the model sees of a few held-out images, what it makes of them, and what they are, for the report."""
    keys = SampleKeys(0, 0, np.arange(min(PICTURES, len(source))))
    batch = engine.place(source.fetch(keys))
    images, visible = batch["images"], batch["visible"]
    with torch.no_grad():
        predictions = model(images, visible).float()
    blank = torch.full_like(predictions, float(images.min()))
    kinds = {
        "seen": reconstruction(images, blank, visible, patch_size, normalized=False),
        "reconstructed": reconstruction(images, predictions, visible, patch_size, normalized=normalize),
        "original": images,
    }
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    shown = {kind: ((some - low) / (high - low).clamp(min=1e-6) * 255).clamp(0, 255) for kind, some in kinds.items()}
    caption = "Held-out images. " + (
        "Predicted patches have the mean and the contrast of the true ones, which are not predicted."
        if normalize
        else ""
    )
    write_figure(
        folder,
        "reconstructions",
        {
            "kind": "images",
            "title": "Hidden patches",
            "caption": caption.strip(),
            "rows": {k: _pixels(v) for k, v in shown.items()},
        },
    )


def _pixels(images: Tensor) -> list:
    """Whole numbers, (height, width) of grey images and (height, width, 3) of others."""
    whole = images.round().to(torch.uint8).cpu()
    return (whole[:, :3].permute(0, 2, 3, 1) if whole.shape[1] >= 3 else whole[:, 0]).tolist()
