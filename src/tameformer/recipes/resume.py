"""Where a run goes, what it continues from, and whether that is the same run."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from tameformer import config as configuration
from tameformer.errors import CheckpointError, ConfigError
from tameformer.recipes.catalogue import Recipe
from tameformer.record import CONFIG, LOG
from tameformer.training import CheckpointFolder
from tameformer.training import checkpoint as checkpoints_on_disk

# A resume may change these and still be the same run: they do not touch what is learned.
_HARMLESS = (
    "output_dir",
    "precision",
    "deterministic",
    "probes.",
    "detectors.",
    "loop.logging_steps",
    "loop.eval_steps",
    "loop.hang_timeout",
    "loop.pause_after",
    "checkpoint.",
    "data.num_workers",
)
# These decide what the weights mean, or which samples a step sees; nothing learned so far would fit.
_FUNDAMENTAL = (
    "task",
    "model.",
    "data.",
    "seed",
    "data_seed",
    "init_from",
    "optim.name",
    "overfit_batches",
    "stabilize",
    "finetune.mixout",  # with mixout_by: what is held, and toward what
    "finetune.prior_decay",
    "finetune.lora_rank",
    "finetune.reinit_layers",
)


def choose_folder(recipe: Recipe, resume: str) -> Path:
    """The run folder: the one given, or the first free of runs/NAME, runs/NAME-2, ...; with a resume the last used.

    Raises:
        ConfigError: The folder given holds a run already, and `resume` does not say to continue it.
    """
    if resume not in ("auto", "never"):
        path = Path(resume)
        return path.parent.parent if path.parent.name == "checkpoints" else path
    if recipe.config.output_dir is not None:
        folder = Path(recipe.config.output_dir)
        if resume == "never" and (folder / LOG).exists():
            raise ConfigError(
                f"{folder} holds a run already; continue it with --resume auto, or give another --output_dir"
            )
        return folder
    number = 1
    while (_numbered(recipe.name, number) / LOG).exists():
        number += 1
    return _numbered(recipe.name, max(1, number - 1) if resume == "auto" else number)


def _numbered(name: str, number: int) -> Path:
    return Path("runs") / (name if number == 1 else f"{name}-{number}")


def find_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, and why newer ones are passed over; None starts anew.

    Raises:
        CheckpointError: The one asked for does not verify, or all there are do not.
    """
    if resume == "never":
        return None, []
    if resume != "auto" and Path(resume).parent.name == "checkpoints":
        checkpoints_on_disk.verify(Path(resume))
        return Path(resume), []
    found, skipped = CheckpointFolder(folder).newest_verified()
    if found is None and (skipped or resume != "auto"):
        raise CheckpointError(f"{folder} holds no sound checkpoint: {'; '.join(skipped) or 'there is none'}")
    return found, skipped


def check_drift(folder: Path, recipe: Recipe) -> list[str]:
    """What differs between the folder's configuration and this one, one sentence a key.

    Raises:
        ConfigError: Something differs without which the weights so far mean nothing.
    """
    stored = configuration.flatten(stored_values(folder))
    ours = configuration.flatten({"task": recipe.task, **asdict(recipe.config)})
    drift: list[str] = []
    for key, value in ours.items():
        value = list(value) if isinstance(value, tuple) else value
        if key in stored and stored[key] != value and not key.startswith(_HARMLESS):
            sentence = f"{key} was {stored[key]} and is {value}"
            if key.startswith(_FUNDAMENTAL):
                raise ConfigError(
                    f"{folder} belongs to another configuration: {sentence}. "
                    f"Repeat the command that began the run, or give another --output_dir"
                )
            drift.append(sentence)
    return drift


def stored_values(folder: Path) -> dict[str, Any]:
    """The configuration that the folder's run began with, or was last resumed with."""
    return configuration.read_yaml(folder / CONFIG)
