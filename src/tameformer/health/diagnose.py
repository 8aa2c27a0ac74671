"""One batch through a model, with every probe on it: how healthy is it, layer by layer and head by head?"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.health.diagnosis import Diagnosis, merged
from tameformer.probes import Probe, Watch, default_probes
from tameformer.probes.amplification import Direction, amplification, gradient_signs, random_signs
from tameformer.readings import Readings

Loss = Callable[[nn.Module, Any], Tensor]


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    probes: Sequence[Probe] | None = None,
) -> Diagnosis:
    """Measure everything that the probes can see in one batch, and say what it means.

    The model is left bit for bit as it was: weights, gradients, modes, optimizer and random state. It is measured in
    evaluation mode, without dropout.

    Args:
        model: Any module.
        batch: Its input: a mapping becomes keywords, a tuple or list positional arguments, anything else the one argument.
        loss: From model and batch to a scalar, for the gradients; None takes `.loss` of the model's output, where it has one.
        optimizer: What trains the model, one or several; one step is taken, measured and undone. None leaves the updates out.
        probes: What to measure; None takes all.

    Raises:
        ValueError: The loss is no scalar.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> report = diagnose(model, torch.randn(2, 5, 8), loss=lambda model, batch: model(batch).square().mean())
        >>> sorted(report.tables)[:2]
        ['Attention heads', 'Gradients and updates']
    """
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    probes = default_probes(model, optimizers) if probes is None else list(probes)
    watch = Watch(model, [(probe, 1) for probe in probes], optimizers=optimizers, counts=lambda: True)
    with _as_it_was(model, optimizers):
        unseen: list[str] = []
        with watch.watching(1):
            scalar = _forward(model, batch, loss)
            if scalar is None:
                unseen.append("gradients and updates: the model returned no loss; give loss=")
            else:
                scalar.backward()
                if optimizers:
                    for each in optimizers:
                        each.step()
                else:
                    watch.observation.tell_gradients()
                    unseen.append("updates: no optimizer was given; give optimizer=")
        values = [Readings(watch.read()).values()]
        unseen += watch.unseen()
    with _as_it_was(model, []):
        values.append(_amplification(model, batch, loss, has_loss=scalar is not None))
    return Diagnosis(merged(values), tuple(unseen))


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping becomes keywords, a tuple or list positional arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _forward(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor | None:
    """The scalar to differentiate; None when the model gives none."""
    if loss is not None:
        value = loss(model, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected loss(model, batch) to give a scalar tensor, got {got}; take its mean")
        return value.reshape(())
    value = getattr(call(model, batch), "loss", None)
    return value if isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad else None


def _amplification(model: nn.Module, batch: Any, loss: Loss | None, *, has_loss: bool) -> dict[str, float]:
    """Relative squared change of the output, by how the weights were moved."""

    def output() -> Tensor:
        seen: list[Tensor] = []
        hook = model.register_forward_hook(lambda module, args, result: seen.append(main_tensor(result)))
        try:
            call(model, batch) if loss is None else loss(model, batch)
        finally:
            hook.remove()
        return seen[0].reshape(-1, seen[0].shape[-1])

    directions: dict[str, Direction] = {"random": random_signs()}
    if has_loss:

        def scalar() -> Tensor:
            value = _forward(model, batch, loss)
            assert value is not None
            return value

        directions["gradient"] = gradient_signs(scalar)
    return {
        f"diag/amplification_{name}/output": amplification(model, output, direction=direction).relative
        for name, direction in directions.items()
    }


def main_tensor(output: Any) -> Tensor:
    """The tensor that a model's output is about: its logits, else its first floats of two axes and more."""
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    logits = output.get("logits") if isinstance(output, Mapping) else None
    found = [logits, *values]
    return next(v for v in found if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1)


@contextmanager
def _as_it_was(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Evaluation mode and fresh gradients inside; afterwards everything is as before."""
    modes = {module: module.training for module in model.modules()}
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    weights = [parameter.detach().clone() for parameter in parameters] if optimizers else []
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng(devices=devices))
        undo.callback(_restore, modes, parameters, gradients, weights)
        for optimizer, state in zip(optimizers, states, strict=True):
            undo.callback(optimizer.load_state_dict, state)
        model.eval()
        for parameter in parameters:
            parameter.grad = None
        yield


@torch.no_grad()
def _restore(
    modes: Mapping[nn.Module, bool],
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    weights: Sequence[Tensor],
) -> None:
    for module, training in modes.items():
        module.training = training
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for parameter, weight in zip(parameters, weights, strict=bool(weights)):
        parameter.copy_(weight)
