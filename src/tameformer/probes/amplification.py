"""How much a small change of all weights changes a model's output.

Liu et al. 2020, "Understanding the Difficulty of Training Transformers", arXiv:2004.08249, section 4: the squared change
grows in proportion to depth for Post-LN, with its logarithm for Pre-LN and Admin.

Differs from the authors' code: it averages over real tokens and squares; by theirs, padding counts. What is perturbed is
told by shape, not by name. Not for weights below float32: a small change is lost in their rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tameformer.shapes import Bool, Float

Direction = Callable[[Sequence[nn.Parameter]], Sequence[Tensor]]
"""The direction that each of the parameters is moved in, of its shape."""


@dataclass(frozen=True, kw_only=True)
class Amplification:
    """What a change of the weights did to the output."""

    squared_change: float
    """Squared L2 norm of the output's change, mean over tokens."""
    relative: float
    """The same over the mean squared norm of the output; for outputs that no norm ends."""
    halving: float
    """Squared change over that of half the step; near 4 where the step is small enough to be linear."""


def random_signs(generator: torch.Generator | None = None) -> Direction:
    """+1 or -1 with equal chance for each weight; without a generator always the same.

    Example:
        >>> random_signs()([nn.Parameter(torch.zeros(2, 3))])[0].abs().sum()
        tensor(6.)
    """

    def draw(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        source = torch.Generator().manual_seed(0) if generator is None else generator
        return [
            torch.empty(p.shape, device=source.device).bernoulli_(generator=source).mul_(2).sub_(1).to(p)
            for p in parameters
        ]

    return draw


def gradient_signs(loss: Callable[[], Tensor]) -> Direction:
    """Minus the sign of the gradient of `loss()`, as one step of sign descent; 0 for weights that have none.

    No `.grad` is touched. `loss` runs in evaluation mode, as `forward` does.
    """

    def descend(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), trained, allow_unused=True)
        found = {id(p): -g.sign() for p, g in zip(trained, gradients, strict=True) if g is not None}
        return [found.get(id(p), torch.zeros_like(p)) for p in parameters]

    return descend


def squared_changes(
    before: Float[Tensor, "*batch dim"], after: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "*batch"] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over tokens of |after - before|^2 and of |before|^2; `mask` is True at tokens that count.

    Example:
        >>> after = torch.tensor([[2.0, 1.0], [1.0, 1.0], [9.0, 9.0]])
        >>> squared_changes(torch.ones(3, 2), after, torch.tensor([True, True, False]))
        (tensor(0.5000), tensor(2.))
    """
    before, after = before.float(), after.float()
    if mask is not None:
        before, after = before[mask], after[mask]
    return (after - before).square().sum(-1).mean(), before.square().sum(-1).mean()


def perturbed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is perturbed: parameters with at least two axes longer than 1, each once.

    So no biases, norms, shortcut scales or gates, whatever their names.
    """
    return [p for p in model.parameters() if p.is_floating_point() and sum(length > 1 for length in p.shape) > 1]


def amplification(
    model: nn.Module,
    forward: Callable[[], Float[Tensor, "*batch dim"]],
    *,
    size: float = 1e-3,
    direction: Direction | None = None,
    mask: Bool[Tensor, "*batch"] | None = None,
) -> Amplification:
    """The output's change when each weight moves by `size` along `direction`, in evaluation mode.

    Weights and modes are as before afterwards, bit for bit, also after an exception. Takes three forward passes and the memory
    of two copies of the weights.

    Args:
        model: Whose weights are moved.
        forward: Calls the model on a fixed batch and gives what to compare, a vector a token.
        size: How far each weight moves.
        direction: Which way; None is `random_signs()`.
        mask: True at tokens that count; None counts all.

    Raises:
        ValueError: `size` is not positive, or the model has nothing to perturb.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> result = amplification(model, lambda: model(torch.eye(4)), size=0.01)
        >>> round(result.squared_change, 6), round(result.halving, 2)
        (0.0003, 4.0)
    """
    parameters = perturbed_parameters(model)
    if size <= 0:
        raise ValueError(f"expected a positive size, got {size}; 1e-3 suits weights of deviation 0.02 and more")
    if not parameters:
        raise ValueError(f"expected a parameter with two axes longer than 1, {type(model).__name__} has none")
    with _kept(model, parameters) as originals, torch.no_grad():
        directions = (random_signs() if direction is None else direction)(parameters)
        before = forward().detach().clone()
        changes = []
        for step in (size, size / 2):
            for parameter, original, way in zip(parameters, originals, directions, strict=True):
                torch.add(original, way, alpha=step, out=parameter)
            changes.append(squared_changes(before, forward(), mask))
    (whole, output), (half, _) = changes
    return Amplification(squared_change=whole.item(), relative=(whole / output).item(), halving=(whole / half).item())


@contextmanager
def _kept(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Copies of the weights, and evaluation mode inside; modes and weights as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    originals = [parameter.detach().clone() for parameter in parameters]
    model.eval()
    try:
        yield originals
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
        for module, training in modes.items():
            module.training = training
