"""From a run folder to a folder with an ordinary model, and back into a module; no data, no code and no pickle in it.

    OUT/  config.json  model.safetensors  [tokenizer.json]  [preprocessing.json]

`config.json` names a builder of ours, its arguments, and what no tensor says: methods that cannot be folded away, norms that
were taken out, and the epsilon of norms that a folded method has changed. Of a run that began from a model of Hugging Face, OUT
is a folder of that library.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tameformer.errors import CheckpointError, ConfigError, PatchError
from tameformer.finetune import lora, plain_tensors
from tameformer.models import Architecture
from tameformer.patch import PatchHandle
from tameformer.recipes import hugging_face
from tameformer.recipes.assemble import ARCHITECTURE, read_profile, seeded
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.resume import find_checkpoint
from tameformer.recipes.stabilize import PROFILE, Settings, apply_methods, methods_of
from tameformer.record import BEST
from tameformer.stabilizers.norm_removal import NoNorm, is_norm, remove_norms
from tameformer.training import CheckpointFolder
from tameformer.training import checkpoint as checkpoints_on_disk
from tameformer.training.checkpoint import load_model_tensors, model_tensors, sync

FORMAT = "tameformer-1"
CONFIG, MODEL = "config.json", "model.safetensors"
COMPANIONS = ("tokenizer.json", "preprocessing.json")
"""Files of a run folder that say how its data become the model's input."""
_KEYS = {"format", "version", "model", "stabilize", "removed_norms", "norm_eps", "trained"}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    """Where."""
    step: int
    """The step of the checkpoint."""
    weights: str
    """"ema" or "raw"."""
    folded: tuple[str, ...]
    """Methods that went into plain weights."""
    kept: tuple[str, ...]
    """Methods that the model still has."""
    skipped: tuple[str, ...]
    """Newer checkpoints that do not verify, one sentence each."""


def export(run: str | Path, out: str | Path, *, weights: str | None = None, best: bool = False) -> Exported:
    """Write the model of a run to a folder that `load` reads: every method folded into plain weights that can be.

    The folder appears whole or not at all. It needs the run folder only, not the data.

    Args:
        run: A run folder, of which the newest sound checkpoint is taken, or one of its checkpoints.
        out: A folder that does not exist or is empty.
        weights: "ema" is the moving average of the weights, "raw" the weights themselves; None is the average where the run
            keeps one, since that is what it evaluated.
        best: Take the checkpoint that `BEST` names, the best by `checkpoint.best_metric`.

    Raises:
        CheckpointError: There is no sound checkpoint, no best one, or no average; or the run folder lacks what is needed.
        ConfigError: The run folder's configuration is not one of ours.
        FileExistsError: `out` holds something already; a FileNotFoundError says that it would lie nowhere.
        ValueError: `weights` is something else.

    Example:
        >>> import tempfile, torch
        >>> from tameformer.recipes.launch import train
        >>> folder = Path(tempfile.mkdtemp())
        >>> settings = {"max_steps": 2, "stabilize": ["sigma_reparam"], "output_dir": str(folder / "run")}
        >>> _ = train("vit-digits", overrides=settings)
        >>> export(folder / "run", folder / "out").folded
        ('sigma_reparam',)
        >>> load(folder / "out")(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 10])
    """
    if weights not in (None, "ema", "raw"):
        raise ValueError(f"expected weights to be 'ema', 'raw' or None, got {weights!r}")
    run, out = Path(run), Path(out)
    _check_free(out)
    checkpoint, skipped = _checkpoint(run, best)
    folder = checkpoint.parent.parent
    if hugging_face.is_kept(folder):
        return _export_hugging_face(checkpoint, out, weights, skipped)
    architecture = _architecture(folder)
    model, handles, kept, step, weights = _folded(checkpoint, architecture.build, weights)
    settings = [{handle.method: handle.settings} if handle.settings else handle.method for handle in kept]
    plain, _ = _changed(architecture.build, methods_of(settings), {})
    values = {
        "format": FORMAT,
        "version": version("tameformer"),
        "model": architecture.to_plain(),
        "stabilize": settings,
        **_beside_tensors(model, plain),
        "trained": {"run": folder.resolve().name, "step": step, "weights": weights},
    }
    with _whole(out) as temporary:
        (temporary / CONFIG).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file({name: one.contiguous() for name, one in model_tensors(model).items()}, temporary / MODEL)
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        load(temporary)  # what cannot be read again is never published
    folded, left = ([one.method for one in handles if (one in kept) is is_kept] for is_kept in (False, True))
    return Exported(out, step, weights, tuple(folded), tuple(left), tuple(skipped))


def load(path: str | Path) -> nn.Module:
    """The model that `export` wrote, in evaluation mode, on the CPU; nothing in the folder is run as code.

    Raises:
        CheckpointError: The folder is not one of ours, or a key, a name, a value, a tensor or a shape in it is not right.

    Example:
        See `export`.
    """
    path = Path(path)
    values = _read_config(path)
    try:
        architecture = Architecture.from_plain(values["model"])
        model, _ = _changed(architecture.build, methods_of(values["stabilize"]), {})
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


def plain_model(path: str | Path) -> tuple[nn.Module, Architecture, list[str]]:
    """The model of a run, of one of its checkpoints, or of a folder that `export` wrote, with what it was built from.

    Of a run the weights are those that `export` takes by itself: the moving average where there is one.

    Returns:
        The model, every method folded that can be; its architecture; and the methods that cannot, by name.

    Raises:
        CheckpointError: There is no such folder, or no sound model in it.
    """
    path = Path(path)
    if (path / MODEL).is_file() and (path / CONFIG).is_file():
        values = _read_config(path)
        return (
            load(path),
            Architecture.from_plain(values["model"]),
            [name for name, _ in methods_of(values["stabilize"])],
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; give a run folder, one of its checkpoints, or an exported folder")
    checkpoint, _ = _checkpoint(path, best=False)
    architecture = _architecture(checkpoint.parent.parent)
    model, _, kept, *_ = _folded(checkpoint, architecture.build, None)
    return model, architecture, [handle.method for handle in kept]


def _folded(
    checkpoint: Path, build: Callable[[], nn.Module], weights: str | None
) -> tuple[nn.Module, list[PatchHandle], list[PatchHandle], int, str]:
    """A checkpoint's model with its methods folded; all handles, those left, the step, and which weights it has."""
    folder = checkpoint.parent.parent
    config = resolve(str(folder)).config
    methods, low_rank = config.methods, getattr(getattr(config, "finetune", None), "lora_rank", None)
    snapshot = checkpoints_on_disk.load(checkpoint)
    if weights is None:
        weights = "ema" if snapshot.average else "raw"
    if weights == "ema" and not snapshot.average:
        raise CheckpointError(f"{checkpoint} holds no moving average; the run had optim.ema_decay null: take raw")
    try:
        model, handles = _changed(build, methods, read_profile(folder))
        if low_rank is not None:
            handles.append(lora(model, rank=low_rank))
    except PatchError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    load_model_tensors(model, plain_tensors(_average(snapshot.average) if weights == "ema" else snapshot.model))
    return model, handles, _fold(handles), int(snapshot.state["step"]), weights


def _export_hugging_face(checkpoint: Path, out: Path, weights: str | None, skipped: Sequence[str]) -> Exported:
    """As `export`, into a folder that `AutoModelForSequenceClassification.from_pretrained` and its like read."""
    folder = checkpoint.parent.parent
    build = partial(hugging_face.empty_model, folder)
    model, handles, kept, step, weights = _folded(checkpoint, build, weights)
    if kept:
        methods = ", ".join(handle.method for handle in kept)
        raise CheckpointError(
            f"{folder}: {methods} cannot be folded into the weights of a Hugging Face model, which are all it has"
        )
    removed = [name for name, module in model.named_modules() if isinstance(module, NoNorm)]
    if removed:
        raise CheckpointError(
            f"{folder}: a Hugging Face model has norms, and {', '.join(removed)} were taken out of this one"
        )
    with _whole(out) as temporary:
        hugging_face.save(model.eval(), folder, temporary)
    return Exported(out, step, weights, tuple(handle.method for handle in handles), (), tuple(skipped))


def _check_free(out: Path) -> None:
    """Refuse a place that holds something, or lies nowhere."""
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise FileExistsError(f"{out} exists and is no empty folder; give another, or remove it")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.absolute().parent}; create it, or give another")


def _checkpoint(run: Path, best: bool) -> tuple[Path, list[str]]:
    if not best:
        found, skipped = find_checkpoint(run, str(run))
        assert found is not None, "find_checkpoint refuses"
        return found, skipped
    pointer = run / BEST
    if not pointer.is_file():
        raise CheckpointError(
            f"{run} names no best checkpoint; it is kept with checkpoint.best_metric, such as eval/loss"
        )
    name = pointer.read_text(encoding="utf-8").strip()
    found = CheckpointFolder(run).folder / name
    if found.name != name:
        raise CheckpointError(f"{pointer} names {name!r}, which is no checkpoint of this run")
    checkpoints_on_disk.verify(found)
    return found, []


def _architecture(folder: Path) -> Architecture:
    if hugging_face.is_kept(folder):
        raise CheckpointError(f"{folder} has a model of Hugging Face, not one of ours; `tame export` writes it as such")
    file = folder / ARCHITECTURE
    try:
        return Architecture.from_plain(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} lacks {ARCHITECTURE}, which says what its model is built from; resuming the run writes it: "
            f"tame train {folder} --output_dir {folder} --resume auto"
        ) from error
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _changed(
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


def _average(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What torch's `AveragedModel` holds of the model."""
    return {name.removeprefix("module."): one for name, one in tensors.items() if name.startswith("module.")}


def _fold(handles: Sequence[PatchHandle]) -> list[PatchHandle]:
    """Bake what can be; a method that waits for another to be baked gets another turn. Returns the rest, in order."""
    remaining = list(handles)
    while True:
        refused = [handle for handle in reversed(remaining) if not _baked(handle)]
        if len(refused) == len(remaining):
            return remaining
        remaining = refused[::-1]


def _baked(handle: PatchHandle) -> bool:
    try:
        handle.bake()
    except PatchError:
        return False
    return True


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


def _read_config(path: Path) -> dict[str, Any]:
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


@contextmanager
def _whole(final: Path) -> Iterator[Path]:
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
