"""What the callbacks share of the guard: a step refused in a trainer that steps in any case.

Neither trainer asks anybody whether to update. But torch's optimizers pass over parameters without a gradient: no weight decay,
no moments, no count behind Adam's bias correction. So a refused step is one whose gradients are gone when the trainer
comes to it, and a schedule that moved all the same is put back afterwards. Nothing of either trainer is replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.health import Guard, GuardConfig
from tameformer.tensors import gathered


class GuardedSteps:
    """Refuses updates on behalf of a callback.

    Args:
        model: What is trained, with its running statistics.
        optimizer: The one that steps, inside all wrappers.
        output_dir: The run folder whose `events.jsonl` is added to.
        config: Thresholds and bounds; there is no way back here, so `max_rollbacks` has no effect.
        steps_done: Optimizer steps done before.
        state: What `state` gave at the checkpoint that is resumed; None begins with empty windows.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        >>> steps = GuardedSteps(model, optimizer, output_dir=tempfile.mkdtemp(), config=GuardConfig())
        >>> steps.add_loss(model(torch.full((1, 2), torch.nan)).mean())
        >>> model(torch.full((1, 2), torch.nan)).mean().backward()
        >>> steps.decide(gradient_norm(optimizer), [schedule])
        >>> optimizer.step(); schedule.step(); steps.finish()
        >>> bool(model.weight.isfinite().all()), schedule.last_epoch, len(optimizer.state)
        (True, 0, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        output_dir: str | Path,
        config: GuardConfig,
        steps_done: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        no_way_back = replace(config, max_rollbacks=0)
        self.guard, self._optimizer = Guard(model, optimizer, output_dir=output_dir, config=no_way_back), optimizer
        if state is not None:
            self.guard.load_state_dict(state)
        self.guard.steps_done = steps_done
        self._losses: list[Tensor] = []
        self._is_sum = True
        self._put_back: Callable[[], None] | None = None

    def add_loss(self, loss: Tensor, *, is_share: bool = True) -> None:
        """One micro-batch's loss: its share of the step's, or the mean over its own samples."""
        self._losses.append(loss.detach().float())
        self._is_sum = is_share

    def decide(self, grad_norm: Tensor, schedulers: Sequence[Any]) -> None:
        """Before the update: let the gradients stand, or take them away.

        Args:
            grad_norm: Of all gradients, before clipping where that can be known.
            schedulers: Those that the trainer moves after the step.

        Raises:
            DivergedError: Too many steps were refused.
        """
        # A loss that nobody told is judged as 0: the gradients of one that is not finite are not finite either.
        loss: Tensor | float = 0.0
        if self._losses:
            losses = torch.stack([each.to(self._losses[0].device) for each in self._losses])  # replicas have their own
            loss = losses.sum() if self._is_sum else losses.mean()
        self._losses = []
        if not self.guard.step(loss, grad_norm=grad_norm):
            self._put_back = held(schedulers, self._optimizer) if schedulers else None

    def finish(self) -> None:
        """After the trainer has moved its schedules: a refused step does not count for them."""
        put_back, self._put_back = self._put_back, None
        if put_back is not None:
            put_back()

    def state(self) -> dict[str, Any]:
        """Plain numbers, for the trainer's checkpoints."""
        return self.guard.state_dict()


def held(schedulers: Sequence[Any], optimizer: Optimizer) -> Callable[[], None]:
    """What puts the schedulers, and what they set in the optimizer, back to where they are now."""
    states = [deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    settings = [
        {key: deepcopy(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]

    def put_back() -> None:
        for scheduler, state in zip(schedulers, states, strict=True):
            scheduler.load_state_dict(state)
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            for key, value in setting.items():
                if isinstance(group[key], Tensor):  # a rate of a compiled or captured step: the same tensor stays
                    group[key].copy_(value)
                else:
                    group[key] = value

    return put_back


@torch.no_grad()
def gradient_norm(optimizer: Optimizer) -> Tensor:
    """L2 norm of all gradients of the optimizer, a scalar on their device."""
    gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    return gathered(torch.nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None]))


def refuse_what_cannot_be_guarded(*, scales_loss: bool, is_deepspeed: bool) -> None:
    """Say before training what the guard cannot do.

    Raises:
        ValueError: The precision or the engine leaves no step to refuse.
    """
    if scales_loss:
        raise ValueError(
            "guard needs fp32 or bf16, got fp16: its gradient scaler skips steps that are not finite by itself, to find "
            "the scale; train in bf16, or leave guard out"
        )
    if is_deepspeed:
        raise ValueError(
            "guard needs gradients that a callback can see, got DeepSpeed, which keeps them to itself; leave guard out"
        )
