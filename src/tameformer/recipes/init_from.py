"""Start a model from the weights of another run: pre-train with one recipe, go on with another, one key between them.

What is handed over is checked, not guessed: settings that no shape shows, such as the number of heads, must agree, and
every weight of the new model must be there, but for the parts that the new task starts afresh.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from tameformer.errors import CheckpointError, ConfigError
from tameformer.models import Architecture
from tameformer.recipes.assemble import ARCHITECTURE, seeded
from tameformer.recipes.export import plain_model
from tameformer.training.checkpoint import model_tensors

logger = logging.getLogger(__name__)
_MAY_DIFFER = {"dropout", "attention_dropout", "drop_path", "pooling", "tie_embeddings", "head_dropout"}


def begun(
    architecture: Architecture, seed: int, path: str | None, *, fresh: Sequence[str], starts: bool
) -> tuple[nn.Module, dict[str, str]]:
    """A model with its first weights, for recipes that change it before `assemble`; and what the run folder keeps of it.

    `starts` is False where a checkpoint will bring the weights.
    """
    model = seeded(seed, architecture.build)
    if path is not None and starts:
        take_weights(model, architecture.config, path, fresh=fresh)
    return model, {ARCHITECTURE: json.dumps(architecture.to_plain(), indent=1) + "\n"}


def take_weights(model: nn.Module, config: Any, path: str, *, fresh: Sequence[str]) -> list[str]:
    """Copy the weights of a run, a checkpoint or an exported folder into a model, in place.

    Methods of `stabilize` are folded into them first; parts that only the other model has, such as a decoder, are left.

    Args:
        model: Fresh, before any method.
        config: What it was built from.
        path: Where the weights are.
        fresh: Beginnings of names that keep their fresh values, such as "head.".

    Returns:
        The names that were copied.

    Raises:
        ConfigError: The folder holds no sound model, its settings differ, or weights are missing or of other shapes; every one
            is named.

    Example:
        >>> import tempfile
        >>> from tameformer.models import VisionConfig, vision_classifier
        >>> from tameformer.recipes.launch import train
        >>> folder = tempfile.mkdtemp()
        >>> _ = train("vit-digits", overrides={"max_steps": 2, "output_dir": folder, "model.stem": "patch"})
        >>> config = VisionConfig(dim=64, num_layers=2, patch_size=2, pooling="mean", positions="sinusoidal")
        >>> model = vision_classifier(config, num_classes=3, image_size=8, channels=1)
        >>> take_weights(model, config, folder, fresh=["head."])[:2]
        ['stem.project.weight', 'stem.project.bias']
    """
    try:
        source, architecture, kept = plain_model(path)
    except CheckpointError as error:
        raise ConfigError(f"init_from {path}: {error}") from error
    if kept:
        raise ConfigError(
            f"init_from {path}: its model keeps {', '.join(kept)}, which cannot be folded into plain weights; "
            "pre-train with methods that can be (`tame methods`)"
        )
    _check_settings(path, asdict(architecture.config), asdict(config))
    given, wanted = model_tensors(source), model_tensors(model)
    wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith(tuple(fresh))}
    problems = [f"{name} is missing there" for name in wanted if name not in given]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        raise ConfigError(f"init_from {path}: its weights do not fit this model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(given[name])
    modules = dict(source.named_modules())
    for name, module in model.named_modules():  # a folded method may have changed a norm's epsilon
        if hasattr(module, "eps") and name in modules:
            module.eps = modules[name].eps
    left = [name for name in given if name not in wanted]
    logger.info("%d tensors from %s; left there: %s", len(wanted), path, ", ".join(left) or "none")
    return list(wanted)


def _check_settings(path: str, given: dict, wanted: dict) -> None:
    """Refuse a setting of both models that differs: the weights would mean something else, whatever their shapes."""
    different = [name for name in wanted if name in given and name not in _MAY_DIFFER and given[name] != wanted[name]]
    if different:
        told = ", ".join(f"{name} is {given[name]} there and {wanted[name]} here" for name in different)
        flags = " ".join(f"--model.{name} {given[name]}" for name in different if given[name] is not None)
        raise ConfigError(
            f"init_from {path}: its model was built otherwise: {told}; give {flags or 'the same settings'}"
        )
