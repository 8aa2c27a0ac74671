"""A run folder under `diagnose`: its model, its checkpoint, its next batch."""

from pathlib import Path

from torch import Tensor, nn

from tameformer.errors import CheckpointError
from tameformer.health import Diagnosis, diagnose
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.resume import find_checkpoint
from tameformer.training import Run
from tameformer.training import checkpoint as checkpoints_on_disk
from tameformer.training.checkpoint import load_model_tensors, load_optimizer_tensors


def examine(path: Path) -> tuple[Diagnosis, int]:
    """Diagnose a run folder at its newest sound checkpoint, or at one of its checkpoints, on the next batch of its data.

    Returns:
        The diagnosis, and the step of the checkpoint.

    Raises:
        CheckpointError: No checkpoint verifies.
        ConfigError: The folder's configuration is not one of ours.
    """
    checkpoint, _ = find_checkpoint(path, str(path))
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no sound checkpoint; train it for some steps first")
    folder = checkpoint.parent.parent
    recipe = resolve(str(folder), None)
    run: Run = recipe.build(recipe.config, folder)
    snapshot = checkpoints_on_disk.load(checkpoint)
    load_model_tensors(run.model, snapshot.model)
    load_optimizer_tensors(run.optimizers, run.model, snapshot.optimizer)
    step = int(snapshot.state["step"])
    # A finished run has no next step: its last one then.
    number = min(step, run.max_steps - 1)
    factor = run.schedule(number)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
    batch = next(iter(run.batches(start=number, stop=number + 1, rank=0, world_size=1)))[0]

    def loss(model: nn.Module, batch: dict) -> Tensor:
        return run.loss(model, batch) / batch["num_items"]

    return diagnose(run.model, batch, loss=loss, optimizer=run.optimizers), step
