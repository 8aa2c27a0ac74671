"""A folder with an ordinary model: written whole or not at all, and read back into a module without running anything.

    OUT/  config.json  model.safetensors  [tokenizer.json]  [preprocessing.json]

`config.json` names a builder of ours, its arguments, and what no tensor says: methods that cannot be folded away, norms that
were taken out, and the epsilon of norms that a folded method has changed.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tameformer.errors import CheckpointError, ConfigError, PatchError
from tameformer.models import Architecture
from tameformer.patch import PatchHandle
from tameformer.recipes.assemble import seeded
from tameformer.recipes.stabilize import PROFILE, Settings, apply_methods, methods_of
from tameformer.stabilizers.norm_removal import NoNorm, is_norm, remove_norms
from tameformer.training.checkpoint import load_model_tensors, model_tensors, sync

FORMAT = "tameformer-1"
CONFIG, MODEL = "config.json", "model.safetensors"
_KEYS = {"format", "version", "model", "stabilize", "removed_norms", "norm_eps", "trained"}


def write_model(
    folder: Path, model: nn.Module, architecture: Architecture, *, methods: list[Any], trained: Mapping[str, Any]
) -> None:
    """Write what `load` reads.

    Args:
        folder: There already.
        model: Folded.
        architecture: What it is built from.
        methods: Those that it still has, as in `stabilize`.
        trained: Where it comes from, for people.
    """
    plain, _ = with_methods(architecture.build, methods_of(methods), {})
    values = {
        "format": FORMAT,
        "version": version("tameformer"),
        "model": architecture.to_plain(),
        "stabilize": methods,
        **_beside_tensors(model, plain),
        "trained": trained,
    }
    (folder / CONFIG).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({name: one.contiguous() for name, one in model_tensors(model).items()}, folder / MODEL)


def load(path: str | Path) -> nn.Module:
    """The model that `export` wrote, in evaluation mode, on the CPU; nothing in the folder is run as code.

    Raises:
        CheckpointError: The folder is not one of ours, or a key, a name, a value, a tensor or a shape in it is not right.

    Example:
        See `export`.
    """
    path = Path(path)
    values = read_config(path)
    try:
        architecture = Architecture.from_plain(values["model"])
        model, _ = with_methods(architecture.build, methods_of(values["stabilize"]), {})
        _remove(model, values["removed_norms"])
        _set_eps(model, values["norm_eps"])
    except (ConfigError, PatchError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path / CONFIG}: {error}") from error
    try:
        tensors = load_file(path / MODEL)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / MODEL} cannot be read: {error}") from error
    try:
        load_model_tensors(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path / MODEL}: {error}") from error
    return model.eval()


def read_config(path: Path) -> dict[str, Any]:
    """What an exported folder says of its model.

    Raises:
        CheckpointError: It is not one of ours, or a key in it is not right.
    """
    try:
        values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} holds no {CONFIG}; give a folder that `tame export` wrote") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        hint = "; transformers.AutoModel.from_pretrained reads it" if "model_type" in values else ""
        raise CheckpointError(f"{path} was not written by `tame export` (expected the format {FORMAT}){hint}")
    for key in sorted(_KEYS ^ values.keys()):
        raise CheckpointError(f"{path / CONFIG}: the key {key} is {'missing' if key in _KEYS else 'unknown'}")
    if not isinstance(values["model"], dict) or not isinstance(values["stabilize"], list):
        raise CheckpointError(f"{path / CONFIG}: expected model to hold keys and stabilize to be a list")
    return values


def with_methods(
    build: Callable[[], nn.Module], methods: Sequence[tuple[str, Settings]], profiled: Mapping[str, Settings]
) -> tuple[nn.Module, list[PatchHandle]]:
    """A model with its methods, of which no weight means anything yet."""

    def no_batches():
        raise PatchError(f"a method took a profile, and there is no {PROFILE} that says what it gave")

    def no_loss(*_: Any) -> Tensor:
        raise AssertionError("nothing is trained here")

    def patched() -> tuple[nn.Module, list[PatchHandle]]:
        model = build()
        handles, *_ = apply_methods(
            model, methods, no_loss, batches=no_batches, mask=lambda batch: {}, profiled=profiled
        )
        return model, handles

    return seeded(0, patched)


def _beside_tensors(model: nn.Module, plain: nn.Module) -> dict[str, Any]:
    """In what a folded model differs from the one that is built, other than in its tensors."""
    removed, eps = [], {}
    for name, module in plain.named_modules():
        now: Any = model.get_submodule(name)
        if isinstance(now, NoNorm):
            removed.append(name)
        elif getattr(now, "eps", None) != getattr(module, "eps", None):
            eps[name] = now.eps
    return {"removed_norms": removed, "norm_eps": eps}


def _remove(model: nn.Module, names: Any) -> None:
    modules = dict(model.named_modules())
    if not isinstance(names, list) or not all(name in modules and is_norm(name, modules[name]) for name in names):
        raise ValueError(f"expected removed_norms to be names of norms of the model, got {names!r}")
    if names:
        remove_norms(model, lambda name, _: name in names, ExitStack())


def _set_eps(model: nn.Module, values: Any) -> None:
    modules: dict[str, Any] = dict(model.named_modules())
    for name, eps in values.items() if isinstance(values, dict) else [("norm_eps", values)]:
        if name not in modules or not hasattr(modules[name], "eps"):
            raise ValueError(f"expected norm_eps to be numbers by the names of norms of the model, got {name!r}")
        if isinstance(eps, bool) or not isinstance(eps, float) or not 0 < eps < math.inf:
            raise ValueError(f"expected norm_eps of {name} to be a number above 0, got {eps!r}")
        modules[name].eps = eps


def check_free(out: Path) -> None:
    """Refuse a place that holds something, or lies nowhere."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is no empty folder; give another, or remove it")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it, or give another")


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `final` when all went well and is gone otherwise, also after Ctrl-C."""
    temporary = final.absolute().parent / f".{final.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        temporary.rename(final)  # takes the place of an empty folder, and of nothing else
        sync(final.absolute().parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
