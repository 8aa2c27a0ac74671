"""From a run folder to a folder with an ordinary model (see `exported`); no data, no code and no pickle in it.

Of a run that began from a model of Hugging Face it is a folder of that library.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from tameformer.errors import CheckpointError, ConfigError, PatchError
from tameformer.finetune import lora, plain_tensors
from tameformer.models import Architecture
from tameformer.patch import PatchHandle
from tameformer.recipes import hugging_face
from tameformer.recipes.assemble import ARCHITECTURE, read_profile
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.exported import (
    CONFIG,
    MODEL,
    check_free,
    load,
    read_config,
    whole_folder,
    with_methods,
    write_model,
)
from tameformer.recipes.resume import find_checkpoint
from tameformer.recipes.stabilize import methods_of
from tameformer.record import BEST
from tameformer.stabilizers.norm_removal import NoNorm
from tameformer.training import CheckpointFolder
from tameformer.training import checkpoint as checkpoints_on_disk
from tameformer.training.checkpoint import load_model_tensors

COMPANIONS = ("tokenizer.json", "preprocessing.json")
"""Files of a run folder that say how its data become the model's input."""


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
    check_free(out)
    checkpoint, skipped = _checkpoint(run, best)
    folder = checkpoint.parent.parent
    if hugging_face.is_kept(folder):
        return _export_hugging_face(checkpoint, out, weights, skipped)
    architecture = _architecture(folder)
    model, handles, kept, step, weights = _folded(checkpoint, architecture.build, weights)
    settings = [{handle.method: handle.settings} if handle.settings else handle.method for handle in kept]
    with whole_folder(out) as temporary:
        write_model(
            temporary,
            model,
            architecture,
            methods=settings,
            trained={"run": folder.resolve().name, "step": step, "weights": weights},
        )
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        load(temporary)  # what cannot be read again is never published
    folded, left = ([one.method for one in handles if (one in kept) is is_kept] for is_kept in (False, True))
    return Exported(out, step, weights, tuple(folded), tuple(left), tuple(skipped))


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
        values = read_config(path)
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
        model, handles = with_methods(build, methods, read_profile(folder))
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
    with whole_folder(out) as temporary:
        hugging_face.save(model.eval(), folder, temporary)
    return Exported(out, step, weights, tuple(handle.method for handle in handles), (), tuple(skipped))


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
