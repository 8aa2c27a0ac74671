"""Image classifiers of Hugging Face in the recipe of ours: what they take, and what is made of our images for them.

Images of files are read in the size that the model wants; arrays, which keep theirs, are scaled on their way into the model.
The pixels are normalized as the model's own were, where its folder says how.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data.sources import ArraySource, DecodedImages
from tameformer.errors import CheckpointError, ConfigError
from tameformer.recipes.assemble import seeded
from tameformer.recipes.hugging_face import FOLDER, describe, empty_model, is_kept
from tameformer.recipes.pretrained import PREPROCESSOR, load_preprocessing, load_pretrained
from tameformer.shapes import Float, Images

logger = logging.getLogger(__name__)
ImageSource = ArraySource | DecodedImages
Call = Callable[[nn.Module, Tensor], Tensor]
"""From a model and images to logits."""


@dataclass(frozen=True)
class PretrainedClassifier:
    """A model that somebody else trained, and all that makes our images its input."""

    model: nn.Module
    """With a head for our classes."""
    call: Call
    """How it is asked."""
    fitted: Callable[[ImageSource], ImageSource]
    """Images with its channels, normalized as it is used to."""
    files: Mapping[str, str]
    """What a run folder keeps of it."""


def pretrained_classifier(
    name: str, folder: Path, images: ImageSource, *, seed: int, replace_head: bool, starts: bool
) -> PretrainedClassifier:
    """A Hugging Face model for these images.

    Args:
        name: Its folder, its name on the hub, or a run that began from one.
        folder: The run folder; a run that goes on needs the first place no more.
        images: To be learned from.
        seed: Of a head that starts afresh.
        replace_head: Let one for another number of classes start afresh.
        starts: False where a checkpoint will bring the weights.

    Raises:
        ConfigError: The weights or the images do not fit the model.
        DataError: There is no such model.
    """
    goes_on = not starts and is_kept(folder)
    load = partial(
        load_pretrained, name, "image-classification", num_labels=images.num_classes, replace_head=replace_head
    )
    try:
        model = seeded(seed, partial(empty_model, folder) if goes_on else load)
    except CheckpointError as error:
        told = str(error).replace("replace_head=True", "--replace_head true")
        raise ConfigError(f"init_from {told}") from error
    known: Any = model
    if images.class_names:
        known.config.id2label = dict(enumerate(images.class_names))
        known.config.label2id = {label: number for number, label in enumerate(images.class_names)}
    said = load_preprocessing(str(folder) if goes_on else name)
    files = describe(model)
    if said is not None:
        files[f"{FOLDER}/{PREPROCESSOR}"] = json.dumps(said, indent=1) + "\n"
    channels, side = getattr(known.config, "num_channels", 3), getattr(known.config, "image_size", None)
    sides = None if side is None else (side, side) if isinstance(side, int) else (side[0], side[1])
    _check(name, images, channels, sides)
    if sides is not None and images.image_shape[1:] != sides:
        logger.info("images of %d x %d are scaled to the %d x %d of %s", *images.image_shape[1:], *sides, name)
    return PretrainedClassifier(
        model, partial(_call, sides=sides), partial(fitted, channels=channels, said=said or {}), files
    )


def fitted(images: ImageSource, *, channels: int, said: Mapping[str, Any]) -> ImageSource:
    """The images with so many channels, normalized as a preprocessor's file says; by their own statistics where it does not.

    Example:
        >>> from tameformer.data.sources import digits
        >>> source = fitted(digits("test"), channels=3, said={"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
        >>> source.image_shape, source.std
        ((3, 8, 8), (0.25, 0.25, 0.25))
    """
    if isinstance(images, ArraySource) and images.image_shape[0] == 1 < channels:  # grey: the same in every channel
        repeated = np.repeat(images.images, channels, axis=1)
        images = replace(images, images=repeated, mean=images.mean * channels, std=images.std * channels)
    mean, std = (tuple(said.get(key) or ()) for key in ("image_mean", "image_std"))
    if len(mean) == len(std) == channels and _in_unit_range(images):
        return replace(images, mean=mean, std=std)
    return images


def _in_unit_range(images: ImageSource) -> bool:
    """Whether pixels are numbers from 0 to 1 before they are normalized, as the library's are."""
    if isinstance(images, DecodedImages) or images.images.dtype == np.uint8:
        return True
    return bool(images.images.min() >= 0 and images.images.max() <= 1)


def _check(name: str, images: ImageSource, channels: int, sides: tuple[int, int] | None) -> None:
    own, *size = images.image_shape
    if own != channels and not (isinstance(images, ArraySource) and own == 1):
        remedy = f"give --data.channels {channels}" if isinstance(images, DecodedImages) else "convert them"
        raise ConfigError(f"init_from {name}: its images have {channels} channels, and those here {own}; {remedy}")
    if isinstance(images, DecodedImages) and sides is not None and tuple(size) != sides:
        raise ConfigError(
            f"init_from {name}: its images are {sides[0]} x {sides[1]}, and those here {size[0]} x {size[1]}; "
            f"give --data.image_size {sides[0]}"
        )


def _call(model: nn.Module, images: Images, *, sides: tuple[int, int] | None) -> Float[Tensor, "batch classes"]:
    if sides is not None and tuple(images.shape[2:]) != sides:
        images = F.interpolate(images, sides, mode="bilinear", antialias=True)
    return model(pixel_values=images).logits
