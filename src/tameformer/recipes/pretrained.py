"""Models that somebody trained before: a Hugging Face folder or name, a run of ours, or an exported folder, by one function."""

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import nn

from tameformer.data.sources.hub import hub_answers
from tameformer.errors import CheckpointError, DataError
from tameformer.finetune import check_fit
from tameformer.models import Architecture, TextClassifierConfig, VisionConfig
from tameformer.recipes.assemble import ARCHITECTURE
from tameformer.recipes.export import export, plain_model
from tameformer.recipes.hugging_face import FOLDER, is_kept, library, quiet
from tameformer.training.checkpoint import model_tensors

Task = Literal["features", "text-classification", "image-classification", "masked-lm", "causal-lm"]
_AUTO = {
    "features": "AutoModel",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
}
_OURS: dict[str, tuple[str, type]] = {
    "text-classification": ("text_classifier", TextClassifierConfig),
    "image-classification": ("vision_classifier", VisionConfig),
}
PREPROCESSOR = "preprocessor_config.json"
"""Where the library says how images become the input of a model."""
_POSITIONS = ("position_embeddings", "wpe")
"""What tables of positions are called, in the families that have one."""
_OUR_HEADS = ("head.", "pooling.")
_PATIENCE = 1.0  # seconds to wait for the hub before giving up; its own client retries for half a minute


def load_pretrained(
    path_or_name: str | Path, task: Task = "features", *, num_labels: int | None = None, replace_head: bool = False
) -> nn.Module:
    """A trained model, with the head that a task needs; in evaluation mode, in float32, on the processor.

    A head that was not trained starts afresh, from torch's global generator. One that was trained for another number of classes
    does so only with `replace_head`; any other tensor that is missing or of another shape is refused, and every one is named.

    Args:
        path_or_name: A folder of `save_pretrained`, a name on the Hugging Face hub, a run folder or checkpoint of ours, or a
            folder that `tame export` wrote. Weights are read from safetensors only.
        task: What the model is for; our models as they are have the task "features".
        num_labels: Classes; None is as many as the model was trained for.
        replace_head: Let a head for another number of classes start afresh.

    Raises:
        CheckpointError: It does not fit.
        DataError: There is no such model, also where the hub does not answer, which takes a second.
        ImportError: `transformers` is not installed and the model is not ours.
        ValueError: An unknown task.

    Example:
        >>> import tempfile
        >>> from tameformer.recipes.launch import train
        >>> folder = tempfile.mkdtemp()
        >>> _ = train("vit-digits", overrides={"max_steps": 2, "output_dir": folder})
        >>> load_pretrained(folder, "image-classification", num_labels=3, replace_head=True).head
        Linear(in_features=64, out_features=3, bias=True)
    """
    if task not in get_args(Task):
        raise ValueError(f"expected a task out of {', '.join(get_args(Task))}, got {task!r}")
    if num_labels is not None and num_labels < 1:
        raise ValueError(f"expected num_labels of at least 1, got {num_labels}")
    if is_ours(path_or_name):
        return _ours(Path(path_or_name), task, num_labels, replace_head)
    if is_kept(run_folder(path_or_name)):  # a run of ours that began from a model of the library
        with tempfile.TemporaryDirectory() as name:
            export(path_or_name, name)
            return _hugging_face(str(path_or_name), task, num_labels, replace_head, weights=name)
    return _hugging_face(str(path_or_name), task, num_labels, replace_head, weights=str(path_or_name))


def is_ours(path_or_name: str | Path) -> bool:
    """Whether this is a run, a checkpoint or an exported folder with a model of ours."""
    path = Path(path_or_name)
    if is_kept(run_folder(path)):
        return False
    if (path / ARCHITECTURE).is_file() or path.parent.name == "checkpoints" or (path / "checkpoints").is_dir():
        return True
    try:
        return "format" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def is_of_library(path_or_name: str | None, folder: Path, *, starts: bool) -> bool:
    """Whether the model of the run in `folder` is one of Hugging Face; a run that goes on does not look where it began."""
    return path_or_name is not None and (not is_ours(path_or_name) if starts else is_kept(folder))


def run_folder(path_or_name: str | Path) -> Path:
    """The run folder that a checkpoint is in; anything else is itself."""
    path = Path(path_or_name)
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _ours(path: Path, task: Task, num_labels: int | None, replace_head: bool) -> nn.Module:
    source, architecture, kept = plain_model(path)
    if task == "features":
        return source.eval()
    if kept:
        raise CheckpointError(
            f"{path}: its model keeps {', '.join(kept)}, so that no head can be changed; load features"
        )
    if task not in _OURS:
        raise ValueError(f"{path} is a model of ours, which has the tasks features, {', '.join(_OURS)}, not {task}")
    builder, config_class = _OURS[task]
    if num_labels is None and architecture.builder != builder:
        raise ValueError(f"{path} was trained for something else than {task}; give num_labels")
    given: Any = architecture.config
    values = {field.name: getattr(given, field.name) for field in fields(config_class) if hasattr(given, field.name)}
    arguments = {key: value for key, value in architecture.arguments.items() if key != "padding_id"}
    if num_labels is not None:
        arguments["num_classes"] = num_labels
    model = Architecture(builder, config_class(**values), arguments).build()
    there, here = model_tensors(source), model_tensors(model)
    check_fit(
        str(path),
        missing=here.keys() - there.keys(),
        mismatched=[
            (name, there[name].shape, one.shape)
            for name, one in here.items()
            if name in there and there[name].shape != one.shape
        ],
        is_head=lambda name: name.startswith(_OUR_HEADS),
        replace_head=replace_head,
    )
    with torch.no_grad():
        for name, one in model.state_dict().items():
            if name in there and there[name].shape == one.shape:
                one.copy_(there[name])
    modules: dict[str, Any] = dict(source.named_modules())
    for name, module in model.named_modules():  # a folded method may have changed a norm's epsilon
        if hasattr(module, "eps") and name in modules:
            module.eps = modules[name].eps
    return model.eval()


def _hugging_face(name: str, task: Task, num_labels: int | None, replace_head: bool, *, weights: str) -> nn.Module:
    transformers = library()
    where = {"local_files_only": reachable(weights)}
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(weights, **where)
            if num_labels is not None and num_labels != config.num_labels:
                config.num_labels = num_labels
            kind: Any = getattr(transformers, _AUTO[task])
            # All that differs is told by `check_fit`; the library would stop at none or at all of it.
            model, info = kind.from_pretrained(
                weights,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **where,
            )
        except SafetensorError as error:
            raise DataError(f"{name} holds damaged weights: {error}; copy or download it again") from error
        except (OSError, ValueError) as error:
            remedy = (
                "" if "safetensors" not in str(error) else "; no pickle is read: write it again with save_pretrained"
            )
            raise DataError(f"{name} cannot be loaded for {task}: {error}{remedy}") from error
    below = f"{model.base_model_prefix}."
    check_fit(
        name,
        missing=info["missing_keys"],
        mismatched=info["mismatched_keys"],
        is_head=lambda one: not one.startswith(below) or ".pooler." in one,
        replace_head=replace_head,
    )
    broken = [key for key, one in model.named_parameters() if not one.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{name} holds weights that are not finite: {', '.join(broken)}; take an earlier checkpoint"
        )
    return model.eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a Hugging Face folder or name, or of a run that began from one, with a padding token in any case.

    Raises:
        DataError: There is none.
    """
    transformers = library()
    if is_kept(run_folder(name)):
        name = str(run_folder(name) / FOLDER)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=reachable(name))
    except (OSError, ValueError) as error:
        raise DataError(f"{name} holds no tokenizer: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what the library makes up where there is none
        raise DataError(f"{name} holds no tokenizer; write it there with tokenizer.save_pretrained")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_preprocessing(name: str) -> dict[str, Any] | None:
    """What a Hugging Face folder or name, or a run that began from one, says of its images; None where it says nothing.

    Raises:
        DataError: The file is damaged.
    """
    if is_kept(run_folder(name)):
        name = str(run_folder(name) / FOLDER)
    found = library().utils.cached_file(
        name, PREPROCESSOR, local_files_only=reachable(name), _raise_exceptions_for_missing_entries=False
    )
    if found is None:
        return None
    try:
        return dict(json.loads(Path(found).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: {PREPROCESSOR} cannot be read: {error}; copy or download it again") from error


def check_tokens(
    name: str, model: nn.Module, tokenizer: Any, texts: Sequence[Sequence[int]], where: Sequence[str]
) -> None:
    """Refuse tokens that a Hugging Face model has no embedding for, and texts that are longer than it has positions.

    Args:
        name: What the model is called in messages.
        model: Of the library.
        tokenizer: That made the tokens.
        texts: Token ids.
        where: The row of each.

    Raises:
        DataError: Such a token or text; its row is named.
    """
    known: Any = model
    size = known.get_input_embeddings().weight.shape[0]
    largest = max(range(len(texts)), key=lambda place: max(texts[place]))
    if max(texts[largest]) >= size:
        token = tokenizer.convert_ids_to_tokens(max(texts[largest]))
        raise DataError(
            f"{where[largest]}: the tokenizer of {name} knows {token!r} as number {max(texts[largest])}, but the model has "
            f"embeddings for {size} tokens; give the tokenizer that the model was trained with"
        )
    longest = max(range(len(texts)), key=lambda place: len(texts[place]))
    tables = [
        one for key, one in model.named_modules() if key.split(".")[-1] in _POSITIONS and isinstance(one, nn.Embedding)
    ]
    # Some count their positions from behind that of padding.
    most = min(
        (one.num_embeddings - (0 if one.padding_idx is None else one.padding_idx + 1) for one in tables), default=None
    )
    if most is not None and len(texts[longest]) > most:
        raise DataError(
            f"{where[longest]}: the text has {len(texts[longest])} tokens, but {name} has positions for {most}; cut texts with "
            f"--model.max_length {most}"
        )


def reachable(name: str) -> bool:
    """Whether a folder, or a copy of a model on the hub, is here; False where the hub has to be asked, and answers.

    Raises:
        DataError: Neither, and what to do.
    """
    if Path(name).is_dir():
        return True
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise DataError(f"{name} is neither a folder nor a name on the hub (owner/name); correct the path")
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return True
    if constants.HF_HUB_OFFLINE or not hub_answers(_PATIENCE):
        raise DataError(
            f"{name} is no folder here, has not been downloaded before, and the hub cannot be reached (or HF_HUB_OFFLINE is "
            "set); connect, or download it elsewhere, write it with save_pretrained, and give that folder"
        )
    return False
