"""Taking the norms out of a model, known by what they are called and hold, not by a list of classes."""

import re
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from tameformer.errors import PatchError
from tameformer.patch import Selector, blocks, select


class NoNorm(nn.Module):
    """Stands where a norm was and gives back what it is given.

    `eps` is not a number: torch's fused layers compare the eps of their norms before they read the weights, and NaN is
    equal to nothing, so that they take their ordinary path.
    """

    eps = float("nan")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input."""
        return x


def is_norm(name: str, module: nn.Module) -> bool:
    """Normalization layers of any library: called a norm, without modules inside, and with vectors for weights at most.

    Example:
        >>> is_norm("", nn.RMSNorm(4)), is_norm("", nn.Linear(4, 4))
        (True, False)
    """
    return (
        re.search(r"norm($|[^a-z])", type(module).__name__, re.IGNORECASE) is not None
        and not any(True for _ in module.children())
        and all(parameter.dim() <= 1 for parameter in module.parameters())
    )


def final_norms(model: nn.Module) -> set[str]:
    """Names of the norms that come after a model's layers, outside of them, in the order of registration.

    Example:
        >>> from torch.nn import LayerNorm, TransformerEncoder, TransformerEncoderLayer
        >>> sorted(final_norms(TransformerEncoder(TransformerEncoderLayer(8, 2, batch_first=True), 2, LayerNorm(8))))
        ['norm']
    """
    layers = tuple(f"{name}." for name in blocks(model))
    found: set[str] = set()
    behind_layers = False
    for name, module in model.named_modules():
        if f"{name}.".startswith(layers) and layers:
            behind_layers = True
        elif behind_layers and is_norm(name, module):
            found.add(name)
    return found


def remove_norms(model: nn.Module, where: Selector, undo: ExitStack) -> list[str]:
    """Put `NoNorm` in the place of each norm that `where` takes; `undo` puts the norms back.

    Raises:
        PatchError: There is none, or the model is itself the norm.
    """
    norms = select(model, where, looked_for="norms to remove")
    if "" in norms:
        raise PatchError(f"expected norms inside a model, got the norm {type(model).__name__} itself")
    for norm in norms.values():
        for parent in model.modules():  # a norm may be used in several places
            for key, child in parent._modules.items():
                if child is norm:
                    parent._modules[key] = NoNorm().train(norm.training)
                    undo.callback(parent._modules.__setitem__, key, norm)
    for module in model.modules():
        # A stack that turns padding into nested tensors relies on its layers taking their fused path.
        if getattr(module, "use_nested_tensor", False) and any(isinstance(inner, NoNorm) for inner in module.modules()):
            undo.callback(module.__dict__.__setitem__, "use_nested_tensor", True)
            module.__dict__["use_nested_tensor"] = False
    return list(norms)
