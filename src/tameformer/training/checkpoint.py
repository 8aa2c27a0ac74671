"""Checkpoints that are whole or absent: temporary folder, fsync, manifest with hashes last, rename, then `LATEST`.

    checkpoints/step-000500/  model.safetensors  optimizer.safetensors  [average.safetensors]  state.json  manifest.json

A folder counts only when its manifest is there and every file has the length and SHA-256 that the manifest gives. Nothing
is unpickled. What a crash leaves behind is a folder whose name starts with a dot, removed by the next save.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.errors import CheckpointError
from tameformer.record import BEST, CHECKPOINTS, LATEST, write_atomically
from tameformer.tensors import gathered, is_sharded

MANIFEST, STATE = "manifest.json", "state.json"
MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    every: int | None = None
    """Steps between checkpoints; null saves at each evaluation and at the end."""
    keep_last: int = 2
    """How many of the newest checkpoints stay."""
    best_metric: str | None = None
    """Keep the checkpoint with the best value of this key, such as `eval/loss`; null keeps none for its value."""
    best_mode: str = "min"
    """Whether the best value is the smallest (min) or the largest (max)."""

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ValueError(
                f"checkpoint.every must be at least 1 step, got {self.every}; null saves at each evaluation"
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}")
        if self.best_mode not in ("min", "max"):
            raise ValueError(f"checkpoint.best_mode must be min or max, got {self.best_mode}")


@dataclass
class Snapshot:
    """All that a run needs to go on as if it had never stopped."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    average: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state of a module by name, each tied tensor once under its first name, whole on every process."""
    return {name: _whole(tensor) for name, tensor in _untied(model).items()}


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The same, of what is shared out over processes the part of this one."""
    seen: set[Any] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # A tie is the same memory seen the same way; empty tensors have no memory to share. A part of a sharded tensor may
        # be empty on one process only, and all must agree: it is the same parameter.
        place = id(tensor) if is_sharded(tensor) else (tensor.data_ptr(), *tensor.shape, *tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        tensors[name] = tensor.detach()
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the module they came from.

    Raises:
        CheckpointError: Names or shapes do not fit; every mismatch is named.
    """
    own = _untied(model)
    problems = [f"{name} is missing" for name in own.keys() - tensors.keys()]
    problems += [f"{name} is not part of the model" for name in tensors.keys() - own.keys()]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)} in the checkpoint and {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError("the checkpoint does not fit the model: " + "; ".join(sorted(problems)))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in tensors:
                tensor.copy_(_sharded_like(tensor, tensors[name]))


def optimizer_tensors(optimizers: Sequence[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name (`<parameter>/<key>`), so that the order of parameters does not matter."""
    return {
        f"{name}/{key}": _whole(value) if isinstance(value, Tensor) else torch.tensor(value)
        for name, optimizer, parameter in _owned(optimizers, model)
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimizer_tensors(optimizers: Sequence[Optimizer], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give each optimizer the state that `optimizer_tensors` took; rates and decays are left as they are.

    Raises:
        CheckpointError: A parameter of the checkpoint is in no optimizer.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        saved.setdefault(name, {})[part] = value
    owned = list(_owned(optimizers, model))
    unknown = saved.keys() - {name for name, _, _ in owned}
    if unknown:
        raise CheckpointError(f"the checkpoint has optimizer state of {sorted(unknown)[0]}, which no optimizer holds")
    for optimizer in optimizers:
        state = optimizer.state_dict()
        order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        names = {id(parameter): name for name, owner, parameter in owned if owner is optimizer}
        state["state"] = {
            index: {key: _sharded_like(parameter, value) for key, value in saved[names[id(parameter)]].items()}
            for index, parameter in enumerate(order)
            if names[id(parameter)] in saved
        }
        optimizer.load_state_dict(state)


def _owned(optimizers: Sequence[Optimizer], model: nn.Module) -> Iterator[tuple[str, Optimizer, nn.Parameter]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[id(parameter)], optimizer, parameter


def _whole(tensor: Tensor) -> Tensor:
    """The full tensor; one that had to be gathered goes to the processor, or each device would hold the whole model."""
    tensor = tensor.detach()
    return gathered(tensor).cpu() if is_sharded(tensor) else tensor


def _sharded_like(like: Tensor, value: Tensor) -> Tensor:
    if not is_sharded(like) or like.shape != value.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the file: each takes its part, and nothing is sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # pyright: ignore


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        run_folder: The run folder; `checkpoints`, `LATEST` and `BEST` live in it.
        keep_last: How many of the newest stay; the best stays in addition.
        before_publish: Called with the temporary folder when all its files are written.
    """

    def __init__(
        self, run_folder: Path, *, keep_last: int = 2, before_publish: Callable[[Path], object] = lambda path: None
    ) -> None:
        self.run_folder = run_folder
        self.folder = run_folder / CHECKPOINTS
        self.keep_last, self.before_publish = keep_last, before_publish

    def save(self, step: int, snapshot: Snapshot, *, best: bool = False, spare: Collection[int] = ()) -> Path:
        """Publish a checkpoint; it exists whole afterwards, or not at all and an OSError says why.

        Args:
            step: Steps completed.
            snapshot: What to save.
            best: Also point `BEST` at it.
            spare: Steps whose checkpoints stay, whatever their age.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for remains in self.folder.glob(".*"):
            shutil.rmtree(remains, ignore_errors=True)
        final = self.path(step)
        temporary = self.folder / f".{final.name}-{os.getpid()}"
        try:
            temporary.mkdir()
            for file, tensors in (
                (MODEL, snapshot.model),
                (OPTIMIZER, snapshot.optimizer),
                (AVERAGE, snapshot.average),
            ):
                if tensors or file != AVERAGE:
                    save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, temporary / file)
            (temporary / STATE).write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
            manifest = {"step": step, "files": {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            self.before_publish(temporary)
            if final.exists():  # a checkpoint of this step that did not verify, or of an earlier telling of it
                shutil.rmtree(final)
            temporary.rename(final)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"checkpoint of step {step} was not written: {error}") from error
        write_atomically(self.run_folder / LATEST, final.name + "\n")
        if best:
            write_atomically(self.run_folder / BEST, final.name + "\n")
        self._prune(spare)
        return final

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """The steps of all checkpoint folders, oldest first, verified or not."""
        found = (path.name.removeprefix("step-") for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(int(number) for number in found if number.isdecimal())

    def newest_verified(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and one sentence for each newer one that does not."""
        skipped: list[str] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                verify(path)
            except CheckpointError as error:
                skipped.append(str(error))
                continue
            return path, skipped
        return None, skipped

    def forget_after(self, step: int) -> bool:
        """Remove all checkpoints of later steps; whether the best was one of them, so that none is the best now."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later))
        write_atomically(self.run_folder / LATEST, self.path(step).name + "\n")
        best = self.run_folder / BEST
        is_gone = best.is_file() and not (self.folder / best.read_text(encoding="utf-8").strip()).is_dir()
        if is_gone:
            best.unlink()
        return is_gone

    def _prune(self, spare: Collection[int]) -> None:
        best = self.run_folder / BEST
        kept = {best.read_text(encoding="utf-8").strip()} if best.is_file() else set()
        for step in self.steps()[: -self.keep_last]:
            if self.path(step).name not in kept and step not in spare:
                shutil.rmtree(self.path(step))


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises:
        CheckpointError: Something is missing, cut short or changed; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path.name} is not a whole checkpoint: its {MANIFEST} cannot be read ({error})"
        ) from error
    if not {MODEL, OPTIMIZER, STATE} <= files.keys():
        raise CheckpointError(f"{path.name} is not a whole checkpoint: its {MANIFEST} does not list {MODEL}")
    for name, expected in files.items():
        if Path(name).name != name:
            raise CheckpointError(f"{path.name} is not trusted: its {MANIFEST} names {name!r}, outside its folder")
        file = path / name
        if file.is_symlink():
            raise CheckpointError(f"{path.name} is not trusted: {name} is a link")
        if not file.is_file():
            raise CheckpointError(f"{path.name} is not a whole checkpoint: {name} is missing")
        if _fingerprint(file) != expected:
            raise CheckpointError(f"{path.name} is damaged: {name} differs from what its {MANIFEST} says")


def load(path: Path) -> Snapshot:
    """Read a checkpoint after verifying it.

    Raises:
        CheckpointError: It does not verify, or holds something else than tensors and plain values.
    """
    verify(path)
    average = path / AVERAGE
    return Snapshot(
        model=_tensors(path / MODEL),
        optimizer=_tensors(path / OPTIMIZER),
        average=_tensors(average) if average.is_file() else {},
        state=_values(path / STATE),
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:  # the manifest fits: it was not written here
        raise CheckpointError(f"{file.parent.name} is not trusted: {file.name} holds no tensors ({error})") from error


def _values(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{file.parent.name} is not trusted: {file.name} holds no JSON ({error})") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """Have a file or a folder on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
