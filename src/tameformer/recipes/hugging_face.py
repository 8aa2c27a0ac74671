"""Models of Hugging Face in run folders: kept as the library's own files, and written out as a folder that the library loads.

    RUN/  hugging_face/  config.json  tokenizer.json  tokenizer_config.json  ...  [preprocessor_config.json]

The weights are in the run's checkpoints. A resumed run and an export read these files and nothing of where the run began.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tameformer.errors import CheckpointError, missing_extra
from tameformer.training.checkpoint import model_tensors

FOLDER = "hugging_face"
"""In the run folder: what the library says of the model, and of its tokenizer or its images."""
_CONFIG = "config.json"


def describe(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """Text files for a run folder, from which `empty_model` builds the model, and the library the tokenizer if there is one."""
    known: Any = model
    known.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as name:
        known.config.save_pretrained(name)
        if tokenizer is not None:
            tokenizer.save_pretrained(name)
        return {f"{FOLDER}/{file.name}": file.read_text(encoding="utf-8") for file in sorted(Path(name).iterdir())}


def is_kept(folder: Path) -> bool:
    """Whether the run in this folder has a model of Hugging Face."""
    return (folder / FOLDER / _CONFIG).is_file()


def empty_model(folder: Path) -> nn.Module:
    """The model of a run with weights that mean nothing yet, in float32.

    Raises:
        CheckpointError: What the folder says is not a model that the library here knows.
        ImportError: `transformers` is not installed.
    """
    transformers = library()
    place = folder / FOLDER
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(place, local_files_only=True)
            config.dtype = torch.float32
            (name,) = config.architectures
            kind = getattr(transformers, name)
            if not issubclass(kind, transformers.PreTrainedModel):
                raise ValueError(f"{name} is no model")
            return kind(config)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{place / _CONFIG} names no model that transformers here can build: {error}"
            ) from error


def save(model: nn.Module, folder: Path, out: Path) -> None:
    """Write the model of a run, with its tokenizer, as `save_pretrained` does; what does not load alike again is refused.

    Raises:
        CheckpointError: The library gives other tensors back than it was given.
    """
    known: Any = model
    transformers = library()
    with quiet(transformers):
        known.save_pretrained(out)
        for file in (folder / FOLDER).iterdir():
            if file.name != _CONFIG:
                shutil.copyfile(file, out / file.name)
        again = type(known).from_pretrained(out, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    written, given = model_tensors(again), model_tensors(model)
    different = [name for name in given.keys() | written.keys() if not _same(written.get(name), given.get(name))]
    if different:
        raise CheckpointError(f"transformers does not give back what it was given: {', '.join(sorted(different))}")


def library() -> Any:
    """The package `transformers`."""
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    return transformers


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own report of what did not fit."""
    log = transformers.utils.logging
    before, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bar:
            log.enable_progress_bar()


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
