"""Hugging Face folders under `diagnose`."""

import json
from pathlib import Path
from typing import Any

import torch

from tameformer.errors import DataError, missing_extra
from tameformer.health import Diagnosis, diagnose

SEQUENCES, LENGTH = 8, 128
"""Size of the batch that is measured: more sequences or tokens than this are cut off."""
_LANGUAGE_MODELS = ("LMHeadModel", "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "MTModel")


def is_pretrained(path: Path) -> bool:
    """Whether the folder was written by `save_pretrained`."""
    return (path / "config.json").is_file()


def examine_pretrained(path: Path, text: Path | None = None) -> tuple[Diagnosis, str]:
    """Diagnose a folder written by `save_pretrained`; nothing is downloaded.

    Args:
        path: The folder.
        text: A UTF-8 text file, a line a sequence, for the tokenizer in the folder; None takes random input from a fixed
            seed: token numbers from the vocabulary, or pixels from a normal distribution.

    Returns:
        The diagnosis, and what it was measured on, in words.

    Raises:
        DataError: A text for a folder without a tokenizer, or an empty one; a folder of another kind.
    """
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "hf") from error
    if "model_type" not in json.loads((path / "config.json").read_text(encoding="utf-8")):
        raise DataError(
            f"{path} names no model_type in its config.json: no folder of Hugging Face. A model that `tame export` wrote "
            f"was exported without its data; diagnose the run instead"
        )
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    model = _model_class(transformers, config).from_pretrained(path, local_files_only=True, use_safetensors=True)
    if text is not None:
        batch, what = _text_batch(transformers, path, text), text.name
    else:
        batch, what = _random_batch(model), "random input"
    if "input_ids" in batch and type(model).__name__.endswith(_LANGUAGE_MODELS):
        batch["labels"] = batch["input_ids"]
    return diagnose(model, batch), what


def _model_class(transformers: Any, config: Any) -> Any:
    """The class that was saved, where the installed library knows it; the headless one otherwise."""
    known = [getattr(transformers, name, None) for name in config.architectures or []]
    return next((found for found in known if found is not None), transformers.AutoModel)


def _text_batch(transformers: Any, path: Path, text: Path) -> dict[str, Any]:
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()][:SEQUENCES]
    if not lines:
        raise DataError(f"{text} has no line with text; give a file with some")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} holds no tokenizer for {text.name}: {error}; leave --text out") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return dict(tokenizer(lines, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH))


def _random_batch(model: Any) -> dict[str, Any]:
    """Input of the kind that the model's first argument is named after."""
    source = torch.Generator().manual_seed(0)
    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, (tuple, list)) else (config.image_size,) * 2
        return {name: torch.randn(SEQUENCES, config.num_channels, *size, generator=source)}
    if name == "input_values":
        return {name: torch.randn(2, 16_000, generator=source)}
    if name == "input_features":
        features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=source)
        return {name: features, "labels": _tokens(config, 2, 16, source)}
    longest = getattr(config, "max_position_embeddings", None) or LENGTH
    return {name: _tokens(config, SEQUENCES, max(2, min(LENGTH, longest) - 2), source)}


def _tokens(config: Any, sequences: int, length: int, source: torch.Generator) -> torch.Tensor:
    vocab_size = config.get_text_config().vocab_size
    return torch.randint(min(10, vocab_size - 1), vocab_size, (sequences, length), generator=source)
