"""Image classification with a Vision Transformer (Dosovitskiy et al. 2020, arXiv:2010.11929), or with convolutions."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches
from tameformer.data.augment import (
    ColorJitter,
    HorizontalFlip,
    MixedSource,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomResizedCrop,
    RandomShift,
    TrivialAugment,
)
from tameformer.data.sources import (
    DecodedImages,
    Transform,
    digits,
    hub_images,
    image_folder,
    npz_arrays,
)
from tameformer.data.sources.images import stratified_split
from tameformer.errors import ConfigError
from tameformer.health import prior_loss
from tameformer.models import Architecture, ConvolutionalConfig, VisionConfig
from tameformer.recipes.assemble import assemble, require_path
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import class_sums, one_pass
from tameformer.recipes.finetune import FinetuneConfig, finish, prepare
from tameformer.recipes.init_from import begun
from tameformer.recipes.pretrained import is_of_library
from tameformer.recipes.pretrained_vision import Call, ImageSource, pretrained_classifier
from tameformer.training import CheckpointFolder, Engine, Run
from tameformer.training.step import Batch

PREPROCESSING = "preprocessing.json"
Augmentation = Literal[
    "shift", "flip", "affine", "erasing", "trivial_augment", "rand_augment", "resized_crop", "color_jitter"
]


@dataclass(frozen=True, kw_only=True)
class VisionDataConfig:
    """Images and their classes."""

    source: Literal["digits", "npz", "folder", "hub"] = "digits"
    """`digits` is embedded, `npz` reads arrays x and y, `folder` a folder a class, `hub` a Hugging Face data set."""
    path: str | None = None
    """File, folder or name of the data; the embedded digits need none."""
    test_split: str = "test"
    """Name of the split that is evaluated."""
    image_size: int = 32
    """Side that images of `folder` and `hub` are scaled to, in pixels; arrays keep their size."""
    channels: Literal[1, 3] = 3
    """Channels that images of `folder` and `hub` are read with: 1 for grey, 3 for colour."""
    batch_size: int = 64
    """Images that one optimizer step sees, over all processes."""
    eval_batch_size: int = 256
    """Images evaluated at a time."""
    validation_fraction: float = 0.0
    """Share of the training images that is held out and evaluated instead of the test images, to choose settings."""
    train_samples: int | None = None
    """Training images to learn from, chosen by the data's seed with equal shares of each class; null takes all."""
    augment: tuple[Augmentation, ...] = ()
    """Random changes of the training images, in order."""
    shift_pixels: int | None = None
    """Largest move of the augmentation `shift`, in pixels along each axis; null takes an eighth of the side."""
    mixup_alpha: float = 0.0
    """Mixing of two images and their labels, Beta(alpha, alpha); 0 is off."""
    cutmix_alpha: float = 0.0
    """Pasting of a part of one image into another, Beta(alpha, alpha); 0 is off."""
    num_workers: int = 0
    """Processes that prepare batches ahead."""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"data.validation_fraction must lie in [0, 1), got {self.validation_fraction}")
        if self.train_samples is not None and self.train_samples < 1:
            raise ValueError(f"data.train_samples must be at least 1, got {self.train_samples}; null takes all")
        if self.shift_pixels is not None and self.shift_pixels < 1:
            raise ValueError(
                f"data.shift_pixels must be at least 1, got {self.shift_pixels}; leave shift out of data.augment for none"
            )
        if self.source == "digits" and self.path is not None:
            raise ValueError(
                f"data.path is {self.path}, but data.source digits reads no file; set data.source to npz, folder or hub"
            )


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of an image classifier."""

    data: VisionDataConfig = field(default_factory=VisionDataConfig)
    """Images and their classes."""
    model: VisionConfig | ConvolutionalConfig = field(default_factory=VisionConfig)
    """The classifier; a Hugging Face model in `init_from` takes its place."""
    init_from: str | None = None
    """Run, checkpoint or exported folder of ours, or a Hugging Face folder or name, to start from; the head starts afresh."""
    replace_head: bool = False
    """With a Hugging Face model: let a head that was trained for another number of classes start afresh."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """What is done to pre-trained weights."""
    label_smoothing: float = 0.0
    """Probability mass of a label that is spread over all classes."""
    num_train_epochs: int | None = 20
    """Passes over the training data; `max_steps` wins when both are given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace_head and self.init_from is None:
            raise ValueError("replace_head is about the head of init_from; give that, or leave replace_head out")


def check_unlabelled(data: VisionDataConfig) -> None:
    """Refuse what mixes labels, where none are learned from."""
    for name in ("mixup_alpha", "cutmix_alpha"):
        if getattr(data, name):
            raise ValueError(
                f"data.{name} mixes labels, of which nothing is learned here, got {getattr(data, name)}; give 0"
            )


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes."""
    data = config.data
    train, held_out = sources(data, config.order_seed)
    starts, call = not CheckpointFolder(folder).steps(), _call_ours
    if config.init_from is not None and is_of_library(config.init_from, folder, starts=starts):
        if isinstance(config.model, ConvolutionalConfig):
            raise ConfigError(
                f"init_from brings a model of its own, and model.architecture {config.model.architecture} another; "
                "leave one of them out"
            )
        found = pretrained_classifier(
            config.init_from, folder, train, seed=config.seed, replace_head=config.replace_head, starts=starts
        )
        model, call, artifacts = found.model, found.call, found.files
        train, held_out = found.fitted(train), found.fitted(held_out)
    else:
        channels, *sides = train.image_shape
        model, artifacts = begun(
            Architecture.of(config.model, num_classes=train.num_classes, image_size=tuple(sides), channels=channels),
            config.seed,
            config.init_from,
            fresh=("head.", "pooling."),
            starts=starts,
        )
    mixed = data.mixup_alpha or data.cutmix_alpha
    source = MixedSource(train, mixup_alpha=data.mixup_alpha, cutmix_alpha=data.cutmix_alpha) if mixed else train
    prepare(model, config.finetune, seed=config.seed, starts=starts)
    run = assemble(
        config,
        folder=folder,
        model=model,
        source=source,
        plan=ShuffledBatches(len(train), data.batch_size, seed=config.order_seed),
        loss=partial(classification_loss, call=call, label_smoothing=config.label_smoothing),
        unit="samples",
        evaluate=partial(evaluate, source=held_out, batch_size=data.eval_batch_size, call=call),
        num_workers=data.num_workers,
        trivial_loss=prior_loss(
            np.bincount(train.labels, minlength=train.num_classes).tolist(), label_smoothing=config.label_smoothing
        ),
        artifacts={PREPROCESSING: json.dumps(preprocessing(train), indent=1) + "\n", **artifacts},
    )
    return finish(run, config.finetune)


def preprocessing(source: ImageSource) -> dict[str, Any]:
    """How an image becomes the model's input: (image / divide_by - mean) / std, by channel; and what the classes are called."""
    is_bytes = isinstance(source, DecodedImages) or source.images.dtype == np.uint8
    return {
        "image_shape": list(source.image_shape),
        "divide_by": 255.0 if is_bytes else 1.0,
        "mean": list(source.mean),
        "std": list(source.std),
        "class_names": list(source.class_names),
    }


def sources(data: VisionDataConfig, seed: int) -> tuple[ImageSource, ImageSource]:
    """Training images with their augmentation, and those that are evaluated."""
    train = read_split(data, "train")
    if data.validation_fraction:
        train, held_out = train.hold_out(data.validation_fraction, seed=seed)
    else:
        held_out = read_split(data, data.test_split, like=train)
    if data.train_samples is not None:
        train = few(train, data.train_samples, seed=seed)
    side = min(train.image_shape[1:])
    return replace(train, transforms=transforms(data.augment, side, shift_pixels=data.shift_pixels)), held_out


def few(source: ImageSource, count: int, *, seed: int) -> ImageSource:
    """So many of the images, with equal shares of each class; mean and deviation stay those of all.

    Raises:
        ConfigError: There are not so many.
    """
    if count > len(source):
        raise ConfigError(
            f"data.train_samples is {count}, but there are {len(source)} training images; give fewer, or null for all"
        )
    if count == len(source):
        return source
    return source.take(stratified_split(source.labels, count / len(source), seed=seed)[1])


def read_split(data: VisionDataConfig, split: str, like: Any = None) -> ImageSource:
    """One split of the data; `like` is the training split, whose classes and statistics hold for all."""
    if data.source == "digits":
        return digits(split)
    path = require_path(data.path, f"images (--data.source {data.source})")
    if data.source == "npz":
        return npz_arrays(path, split, like=like)
    read = image_folder if data.source == "folder" else hub_images
    return read(path, split, size=data.image_size, channels=data.channels, like=like)


def transforms(names: tuple[Augmentation, ...], side: int, *, shift_pixels: int | None = None) -> tuple[Transform, ...]:
    """The random changes by name, in strengths that suit images of this side, in pixels.

    Example:
        >>> transforms(("shift",), 32)[0].pixels, transforms(("shift",), 32, shift_pixels=1)[0].pixels
        (4, 1)
    """
    known = {
        "shift": RandomShift(pixels=max(1, side // 8) if shift_pixels is None else shift_pixels),
        "flip": HorizontalFlip(),
        "affine": RandomAffine(),
        "erasing": RandomErasing(),
        "trivial_augment": TrivialAugment(),
        "rand_augment": RandAugment(),
        "resized_crop": RandomResizedCrop(),
        "color_jitter": ColorJitter(),
    }
    return tuple(known[name] for name in names)


def _call_ours(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def classification_loss(
    model: nn.Module, batch: Batch, *, call: Call = _call_ours, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy summed over the images; labels are class numbers or, when mixed, probabilities."""
    logits = call(model, batch["images"])
    return F.cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=label_smoothing)


def evaluate(engine: Engine, model: nn.Module, *, source: ImageSource, batch_size: int, call: Call) -> dict[str, float]:
    """Mean cross-entropy, and the share of images whose class was recognized."""
    return one_pass(engine, model, source, SequentialBatches(len(source), batch_size), partial(measure, call=call))


def measure(model: nn.Module, batch: Batch, *, call: Call) -> Mapping[str, Tensor]:
    """Sums over a batch of images."""
    return class_sums(call(model, batch["images"]), batch["labels"])
