"""One optimizer step: forward and backward over the micro-batches, clip, decide, update.

The decision falls before the update, from loss and gradient norm over all processes: what is not finite, or beyond the
limits, changes neither weights nor moments nor the count that Adam corrects its bias by. Nothing is multiplied by 0 for it:
0 times NaN is NaN.

A step that runs out of memory changes nothing either, on any process; the caller repeats it in smaller parts.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from tameformer.errors import OutOfMemoryError
from tameformer.optim.clipping import Clip, Norms
from tameformer.tensors import gathered, is_sharded
from tameformer.training.engine import Engine
from tameformer.training.memory import Batch, in_parts, is_out_of_memory, num_rows
from tameformer.training.sharding import is_shared_out

Loss = Callable[[nn.Module, Batch], Tensor]
"""The loss of a batch, summed (not averaged) over its `num_items` targets."""


Limits = Callable[[], tuple[float, float]]
"""The largest mean loss, and the largest gradient norm, that a step is taken with; asked for just before the update."""
_LARGEST = torch.finfo(torch.float32).max


def any_finite() -> tuple[float, float]:
    """Limits that refuse only what is not finite."""
    return _LARGEST, _LARGEST


@dataclass(frozen=True)
class StepResult:
    """What a step measured; tensors stay on the device."""

    loss_sum: Tensor
    """Loss summed over the targets of the whole step, over all processes."""
    num_items: float
    """Targets in the whole step, over all processes."""
    grad_norm: Tensor
    """Joint L2 norm of the gradients before clipping, equal on all processes."""
    taken: Tensor
    """Whether the weights were updated, 1 or 0."""
    stop_requested: bool
    """Whether any process was asked to stop."""
    suspects: Sequence[nn.Parameter] = ()
    """Whose gradient was not finite, where somebody looked: on an accelerator the gradients are gone by then."""
    clip: Mapping[str, Tensor] = field(default_factory=dict)
    """What clipping did: `clipped`, 1 or 0, and limits that move."""


def train_step(
    engine: Engine,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    micro_batches: Sequence[Batch],
    loss: Loss,
    *,
    clip: Clip,
    tell_norms: Norms | None = None,
    limits: Limits = any_finite,
    stop_requested: bool = False,
    parts: int = 1,
) -> StepResult | None:
    """Update the weights once, or not at all.

    Every target of the step has the same weight, however the targets are spread over micro-batches and processes: losses
    are summed and divided by the number of targets of the whole step. A mean of per-batch means would weigh the targets
    of short batches more (huggingface/transformers #34191).

    Args:
        engine: Device and processes.
        model: As `engine.prepare` returned it.
        optimizers: Together they hold each parameter once.
        micro_batches: This process's share of the step, not empty.
        loss: Sum over the targets of a batch.
        clip: Of the same optimizers.
        tell_norms: Given the norms of single gradients that clipping computes anyway.
        limits: What the step is refused beyond. All processes must answer alike.
        stop_requested: This process's wish to stop; the answer is common to all processes.
        parts: Pieces that each micro-batch is cut into, to save memory.

    Returns:
        What was measured; None when memory ran out on some process. Then nothing has changed, and more parts need less.

    Raises:
        OutOfMemoryError: Memory ran out where fewer samples at a time do not help.
    """
    num_items, stops = engine.sum([sum(batch["num_items"] for batch in micro_batches), stop_requested])
    # DDP averages gradients over processes; the factor world_size turns its mean into the sum that is meant.
    scale = torch.full((), engine.world_size / num_items, device=engine.device)
    backward = _Backward(engine, model, loss, micro_batches, scale, parts=parts)
    loss_sum = backward.run_if_memory_holds()
    if loss_sum is None:  # outside of the handler, whose error holds on to all activations
        _zero_grad(optimizers)
        gc.collect()
        if engine.device.type != "cpu":
            torch.get_device_module(engine.device).empty_cache()
        if engine.world_size == 1:
            return None
        backward.join()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    own_norm = clip(tell_norms=tell_norms)
    # One exchange for all; the mean of the norms is the same number on all processes, whatever their hardware rounds to.
    failed = loss_sum is None
    loss_sum = own_norm.new_zeros(()) if loss_sum is None else loss_sum
    told = [loss_sum, own_norm.to(loss_sum)]
    if engine.world_size > 1:
        told.append(torch.full_like(loss_sum, float(failed)))
    sums = engine.sum_tensor(torch.stack(told))
    if engine.world_size > 1 and bool(sums[2]):
        clip.settle(False)
        _zero_grad(optimizers)
        return None
    loss_sum, grad_norm = sums[0], sums[1] / engine.world_size
    taken = update(optimizers, loss_sum, grad_norm, num_items=num_items, limits=limits())
    clip.settle(taken)
    suspects = [] if taken is not False or bool(grad_norm.isfinite()) else [p for p in parameters if _is_broken(p)]
    _zero_grad(optimizers)
    if not isinstance(taken, Tensor):
        taken = torch.full_like(loss_sum, float(taken))
    return StepResult(loss_sum, num_items, grad_norm, taken, bool(stops), suspects, clip.readings())


class _Backward:
    """The forward and backward passes of a step on this process.

    Args:
        engine: Device and processes.
        model: As `engine.prepare` returned it.
        loss: Sum over the targets of a batch.
        micro_batches: One after the other.
        scale: Factor on the gradient.
        parts: Pieces that each micro-batch is cut into.
    """

    def __init__(
        self,
        engine: Engine,
        model: nn.Module,
        loss: Loss,
        micro_batches: Sequence[Batch],
        scale: Tensor,
        *,
        parts: int,
    ) -> None:
        self._engine, self._model, self._loss, self._scale = engine, model, loss, scale
        self._micro_batches, self._parts = micro_batches, parts
        self._batches = [part for batch in micro_batches for part in in_parts(batch, parts)]
        self._began = False
        self.is_exchanging = False
        """Whether the backward pass runs in which processes exchange gradients."""

    def run(self) -> Tensor:
        """Gradients are summed up; returns the sum of the losses."""
        losses: list[Tensor] = []
        for number, batch in enumerate(self._batches, start=1):
            is_last = number == len(self._batches)
            with self._engine.accumulate(self._model, last=is_last):
                placed = self._engine.place(batch)
                self._began = True
                with self._engine.autocast():
                    batch_loss = self._loss(self._model, placed)
                self.is_exchanging = is_last and self._engine.world_size > 1
                # As `batch_loss.backward(self._scale)`, for which torch imports a library of symbolic algebra.
                (batch_loss * self._scale).backward()
            losses.append(batch_loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def run_if_memory_holds(self) -> Tensor | None:
        """The same; None when memory ran out.

        Raises:
            OutOfMemoryError: Batches that can be cut no smaller, or processes that wait for each other's gradients.
        """
        try:
            return self.run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._parts >= max(map(num_rows, self._micro_batches)):
                raise OutOfMemoryError(
                    f"memory runs out with one sample at a time: {error}; try a smaller model"
                ) from error
            if self.is_exchanging or is_shared_out(self._model):
                raise OutOfMemoryError(
                    f"memory ran out while weights or gradients were exchanged between processes, which cannot be repeated: "
                    f"{error}; resume with twice the gradient_accumulation_steps"
                ) from error
            return None

    def join(self) -> None:
        """Take part in the exchange that the other processes wait in, with one sample whose gradient nobody will use."""
        if self._began and hasattr(self._model, "require_forward_param_sync"):
            cast(Any, self._model).require_forward_param_sync = False  # DDP: buffers have been exchanged in this step
        one = in_parts(self._batches[-1], num_rows(self._batches[-1]))[0]
        with self._engine.autocast():
            joining = self._loss(self._model, self._engine.place(one))
        joining.backward()


def _zero_grad(optimizers: Sequence[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def update(
    optimizers: Sequence[Optimizer],
    loss_sum: Tensor,
    grad_norm: Tensor,
    *,
    num_items: float,
    limits: tuple[float, float],
) -> Tensor | bool:
    """Step the optimizers if the loss and the gradient norm are finite and within the limits.

    Returns:
        Whether they stepped. Fused optimizers on an accelerator are told by a tensor, and nobody waits; then the answer is
        a tensor, too, 1 or 0. For all others the two numbers are read, which is the one time that a step waits.
    """
    largest_loss, largest_norm = min(limits[0] * num_items, _LARGEST), min(limits[1], _LARGEST)
    # Apple's fused kernels take the tensor and do not look at it.
    if grad_norm.device.type in ("cpu", "mps") or not can_refuse_on_device(optimizers):
        # NaN is within no limits.
        taken = -_LARGEST <= float(loss_sum) <= largest_loss and float(grad_norm) <= largest_norm
        if taken:
            for optimizer in optimizers:
                optimizer.step()
        return taken
    is_fine = (loss_sum >= -_LARGEST) & (loss_sum <= largest_loss) & (grad_norm <= largest_norm)
    with told_to_refuse(optimizers, (~is_fine).float()):
        for optimizer in optimizers:
            optimizer.step()
    return is_fine.to(loss_sum.dtype)


def can_refuse_on_device(optimizers: Sequence[Optimizer]) -> bool:
    """Whether all the optimizers leave everything as it was, moments and counts included, when told so by a tensor.

    Not in the first step: SGD would keep the momentum buffer that it has allocated and not filled. Not where somebody
    listens to steps, who would be told of one that was not taken. Not for sharded weights.
    """
    listened_to = bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    return not listened_to and all(
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and len(optimizer.state) > 0
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
        for optimizer in optimizers
    )


@contextmanager
def told_to_refuse(optimizers: Sequence[Optimizer], refused: Tensor) -> Iterator[None]:
    """Fused optimizers step inside only where `refused` is 0; it is how torch's own gradient scaler tells them."""
    for optimizer in optimizers:
        optimizer.grad_scale, optimizer.found_inf = None, refused  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for optimizer in optimizers:
            del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]


def _is_broken(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and not bool(gathered(parameter.grad).isfinite().all())
