"""Some steps of training, watched or not, and all that a watcher might leave behind."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tameformer.probes import AttentionEntropy, Probe, Watch, default_probes
from zoo.family import main_output


@dataclass
class Trained:
    """What a run leaves."""

    losses: list[float]
    weights: list[Tensor]
    generator: Tensor
    readings: dict[int, dict[str, Tensor]]
    unseen: list[str]

    def same_run(self, other: "Trained") -> bool:
        """Equal to the bit."""
        return (
            self.losses == other.losses
            and all(torch.equal(a, b) for a, b in zip(self.weights, other.weights, strict=True))
            and torch.equal(self.generator, other.generator)
        )


def run_steps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    watched: bool,
    steps: int = 4,
    micro_batches: int = 1,
    autocast: bool = False,
    sequences: int | None = 1,
    probes: Callable[..., Sequence[Probe]] = default_probes,
) -> Trained:
    """Some steps of AdamW, every second one watched by these probes, and a check that they left nothing behind."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = Watch(model, [(p, 2) for p in probes(model, [optimizer])], optimizers=[optimizer], sequences=sequences)
    before = traces(model, optimizer)
    losses, readings = [], {}
    torch.manual_seed(1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with watch.watching(step) if watched and watch.due(step) else contextlib.nullcontext():
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = main_output(model(**inputs)).float().square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        if watched and watch.due(step):
            readings[step] = {key: value.clone() for key, value in watch.read().items()}
            assert readings[step]
        assert traces(model, optimizer) == before
    weights = [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
    return Trained(losses, weights, torch.get_rng_state(), readings, watch.unseen())


def attention_alone(*_: Any) -> list[Probe]:
    """The probe for which a second look is at the sites of attention alone."""
    return [AttentionEntropy()]


def own_attributes(thing: Any) -> list[str]:
    """Without the marks that compilation makes."""
    return sorted(name for name in vars(thing) if not name.startswith("_dynamo"))


def traces(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a watcher might leave on a model, an optimizer or in torch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "hooks": {name: [list(vars(module)[hook]) for hook in hooks] for name, module in model.named_modules()},
        "attributes": {name: own_attributes(module) for name, module in model.named_modules()},
        "parameters": {
            name: [
                own_attributes(p),
                list(p._backward_hooks or []),
                list(p._post_accumulate_grad_hooks or []),
            ]
            for name, p in model.named_parameters()
        },
        "global": [list(getattr(nn.modules.module, f"_global{hook}")) for hook in hooks[:4]],
        "optimizer": [list(optimizer._optimizer_step_pre_hooks), list(optimizer._optimizer_step_post_hooks)],
        "modes": torch.overrides._get_current_function_mode_stack(),
        "grad": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "stance": "default" if dynamo is None else dynamo._stance.stance,
    }
