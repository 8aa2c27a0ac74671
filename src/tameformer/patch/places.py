"""Where in a model there is something to see, and under which name."""

from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from torch import nn

from tameformer.patch.blocks import blocks


class Place(NamedTuple):
    """A module that carries hooks during an observed forward pass."""

    module: nn.Module
    block: str | None
    """Its name where it is one of the model's layers."""
    label: str | None
    """The name under which it runs; None for one without parameters, which runs under that of its caller."""
    caller: str | None = None
    """The name of the innermost module with parameters around it; None where it stands in several places."""


class Places:
    """What an observation has to know of a model, gathered once.

    Args:
        model: As it is during the observed steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self.root = Place(model, None, "")
        layers = {module: name for name, module in blocks(model).items()}
        self.seq_first = {name for module, name in layers.items() if _is_seq_first(module)}
        """The layers that work on (seq, batch, dim)."""
        labels = {
            module: name if module in layers or _has_parameters(module) else None
            for module, name in self._names.items()
        }
        labelled = set(labels.values())
        callers: dict[nn.Module, str | None] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            callers[module] = None if module in callers else _around(name, labelled)
        self.watched = [
            Place(module, layers.get(module), labels[module], callers[module])
            for module, name in self._names.items()
            if name and _may_call(module)
        ]

    def unseen(self, attention_layers: Iterable[str]) -> list[str]:
        """Modules that are attention by their class's name and have none of these layers inside or around them."""
        suspects = [
            name
            for module, name in self._names.items()
            if "attention" in type(module).__name__.lower()
            and _has_parameters(module)
            and not any("attention" in type(inner).__name__.lower() for inner in _below(module))
        ]
        seen = set(attention_layers)
        return [
            name
            for name in suspects
            if name not in seen
            and not any(f"{name}.".startswith(f"{layer}.") or layer.startswith(f"{name}.") for layer in seen)
        ]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _around(name: str, labelled: Collection[str | None]) -> str:
    """The innermost of these names around a module's."""
    while name:
        name = name.rpartition(".")[0]
        if name in labelled:
            return name
    return ""


def _may_call(module: nn.Module) -> bool:
    """Whether the module may call other modules or attention: all but torch's own leaves."""
    is_leaf = next(module.children(), None) is None
    return not is_leaf or not type(module).__module__.startswith("torch.nn.modules")


def _is_seq_first(block: nn.Module) -> bool:
    """Whether a layer works on (seq, batch, dim), as torch's own do unless told otherwise."""
    return any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in block.modules())


def _below(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if inner is not module and _has_parameters(inner))
