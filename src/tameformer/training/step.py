"""One optimizer step: forward and backward over the micro-batches, clip, update."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.optim import clip_norm
from tameformer.optim.clipping import Norms
from tameformer.training.engine import Engine

Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch, summed (not averaged) over its `num_items` targets."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device."""

    loss_sum: Tensor
    """Loss of this process's micro-batches, summed over their targets."""
    num_items: float
    """Targets in the whole step, over all processes."""
    grad_norm: Tensor
    """Joint L2 norm of the gradients before clipping."""
    stop_requested: bool
    """Whether any process was asked to stop."""


def train_step(
    engine: Engine,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    micro_batches: Sequence[Batch],
    loss: Loss,
    *,
    max_grad_norm: float | None,
    tell_norms: Norms | None = None,
    stop_requested: bool = False,
) -> StepResult:
    """Update the weights once.

    Every target of the step has the same weight, however the targets are spread over micro-batches and processes: losses
    are summed and divided by the number of targets of the whole step. A mean of per-batch means would weigh the targets
    of short batches more (huggingface/transformers #34191).

    Args:
        engine: Device and processes.
        model: As `engine.prepare` returned it.
        optimizers: Together they hold each parameter once.
        micro_batches: This process's share of the step, not empty.
        loss: Sum over the targets of a batch.
        max_grad_norm: None measures the norm and does not clip.
        tell_norms: Given the norms of single gradients that clipping computes anyway.
        stop_requested: This process's wish to stop; the answer is common to all processes.
    """
    num_items, stops = engine.sum([sum(batch["num_items"] for batch in micro_batches), stop_requested])
    # DDP averages gradients over processes; the factor world_size turns its mean into the sum that is meant.
    scale = torch.full((), engine.world_size / num_items, device=engine.device)
    losses: list[Tensor] = []
    for number, batch in enumerate(micro_batches, start=1):
        with engine.accumulate(model, last=number == len(micro_batches)):
            with engine.autocast():
                batch_loss = loss(model, engine.place(batch))
            batch_loss.backward(scale)
        losses.append(batch_loss.detach())
    parameters = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    grad_norm = clip_norm(parameters, max_grad_norm, tell_norms=tell_norms)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss_sum = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return StepResult(loss_sum, num_items, grad_norm, bool(stops))
