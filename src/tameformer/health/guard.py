"""The guard in anyone's training loop: one question before each update."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from tameformer.errors import DivergedError
from tameformer.health.policy import Answer, GuardConfig, Policy
from tameformer.record import EVENTS, encode_line

logger = logging.getLogger(__name__)


class Guard:
    """Says which updates a plain loop may do: `if guard.step(loss): optimizer.step()`.

    A refused step changes nothing: its gradients are cleared, and the running statistics of batch norms, which the forward
    pass has moved already, are put back. Under several processes all get the same answer, by one exchange of two numbers.
    The answer is an `if`, so an accelerator is waited for once a step; the loop of recipes does without.

    Going back is the loop's own business, because only it knows its checkpoints and its data: `roll_back` is called when
    skipping does not help. Without it the run ends then.

    Args:
        model: What is trained.
        optimizer: What updates it, one or several.
        output_dir: The run folder whose `events.jsonl` is added to; build a `Monitor` of the same folder first.
        config: Thresholds and bounds.
        roll_back: Given the answer. Loads weights, optimizer and, with `load_state_dict`, this guard from a checkpoint of
            step `answer.kept_from` or before; goes on behind the data seen since, and multiplies the rate by
            `rate_factor`.

    Raises:
        ValueError: The optimizer updates nothing of the model.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> guard = Guard(model, optimizer)
        >>> for batch in (torch.ones(2, 4), torch.full((2, 4), torch.nan)):
        ...     loss = model(batch).square().mean()
        ...     loss.backward()
        ...     if guard.step(loss):
        ...         optimizer.step()
        ...     optimizer.zero_grad()
        >>> guard.steps_skipped, bool(model.weight.isfinite().all())
        (1, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        output_dir: str | Path | None = None,
        config: GuardConfig | None = None,
        roll_back: Callable[[Answer], object] | None = None,
    ) -> None:
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.steps_done = self.steps_skipped = 0
        self._policy, self._go_back = Policy(config), roll_back
        self._parameters = [p for each in self.optimizers for group in each.param_groups for p in group["params"]]
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        if not any(id(parameter) in self._names for parameter in self._parameters):
            raise ValueError(
                f"the optimizer holds no parameter of this {type(model).__name__}; give the model that it updates"
            )
        self._events = None if output_dir is None else Path(output_dir) / EVENTS
        self._statistics = [
            buffer
            for module in model.modules()
            if getattr(module, "track_running_stats", False)
            for buffer in module.buffers(recurse=False)
        ]
        self._kept = [buffer.clone() for buffer in self._statistics]

    @property
    def rate_factor(self) -> float:
        """What the learning rate is to be multiplied by, after the rollbacks so far."""
        return self._policy.rate_factor

    def step(self, loss: Tensor | float, *, grad_norm: Tensor | float | None = None) -> bool:
        """Whether the optimizer may step; ask after `backward` and clipping.

        Args:
            loss: Of the step, mean over what was learned from.
            grad_norm: Of all gradients before clipping, as `clip_grad_norm_` returns it; None measures it, which is a
                pass over the gradients.

        Raises:
            DivergedError: Too many steps were refused, and there is no way back.
        """
        if grad_norm is None:
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        value, norm = self._agreed(loss, grad_norm)
        largest_loss, largest_norm = self._policy.limits()
        taken = math.isfinite(value) and value <= largest_loss and math.isfinite(norm) and norm <= largest_norm
        self.steps_done += 1
        broken = [] if math.isfinite(norm) else self._broken()
        answer = self._policy.observe(self.steps_done, value, norm, taken=taken, places=broken)
        if taken:
            for kept, buffer in zip(self._kept, self._statistics, strict=True):
                kept.copy_(buffer)
            return True
        assert answer is not None, "the policy answers for each step that was not taken"
        self._undo()
        self._tell(answer, {"loss": value, "grad_norm": norm})
        if answer.do == "roll_back" and self._go_back is not None:
            lost = self._policy.state()
            self._go_back(answer)
            self._policy.rolled_back(lost)
        elif answer.do != "go_on":
            raise DivergedError(f"{answer.message} Go on from a checkpoint of step {answer.kept_from} or before")
        return False

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint: with them the decisions after a resume are those of a run that never stopped."""
        return {"steps_done": self.steps_done, "steps_skipped": self.steps_skipped, "policy": self._policy.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`; load the model's before, so that its running statistics are the ones kept."""
        self.steps_done, self.steps_skipped = state["steps_done"], state["steps_skipped"]
        self._policy.load(state["policy"])
        self._kept = [buffer.clone() for buffer in self._statistics]

    def _agreed(self, loss: Tensor | float, norm: Tensor | float) -> tuple[float, float]:
        """Loss and norm as means over all processes, so that none decides alone."""
        device = self._parameters[0].device
        values = [torch.as_tensor(each).detach().reshape(()) for each in (loss, norm)]
        numbers = torch.stack([value.to(device, torch.float32) for value in values])
        if _is_distributed():
            distributed.all_reduce(numbers)
            numbers /= distributed.get_world_size()
        first, second = numbers.tolist()
        return first, second

    def _broken(self) -> list[str]:
        broken = [p for p in self._parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
        return [self._names[id(parameter)] for parameter in broken if id(parameter) in self._names]

    def _undo(self) -> None:
        self.steps_skipped += 1
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for kept, buffer in zip(self._kept, self._statistics, strict=True):
            buffer.copy_(kept)

    def _tell(self, answer: Answer, measured: Mapping[str, float]) -> None:
        logger.warning("%s", answer.message)
        if self._events is not None and (not _is_distributed() or distributed.get_rank() == 0):
            self._events.parent.mkdir(parents=True, exist_ok=True)
            record = {"step": self.steps_done, "kind": answer.kind, "message": answer.message}
            with open(self._events, "a", encoding="utf-8") as file:
                file.write(encode_line({**record, **measured, **answer.details}))


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
