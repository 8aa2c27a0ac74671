"""How the parts of a layer are named and told apart, whosever it is."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tameformer.patch.adapters.branch import Attention, Branch, Kind, Matrix, NormPlace, Placement


def branch_of(
    name: str, block: str, kind: Kind, placement: Placement, output: Matrix, inputs: Sequence[Matrix], **more
) -> Branch:
    """A branch that the module of its last matrix returns, unless `more` says otherwise."""
    given = {"result": output.module, **more}
    return Branch(name, block, "", kind, placement, output, inputs=tuple(inputs), **given)


def linear(prefix: str, parent: nn.Module, attribute: str) -> Matrix:
    """The weight of a linear layer, whichever way round it is stored."""
    module = parent.get_submodule(attribute)
    bias = "bias" if getattr(module, "bias", None) is not None else None
    return Matrix(f"{prefix}.{attribute}", module, bias=bias, is_transposed=_is_transposed(module))


def linears(prefix: str, parent: nn.Module, *attributes: str) -> list[Matrix]:
    """Several of them."""
    return [linear(prefix, parent, attribute) for attribute in attributes]


def attention_of(name: str, module: nn.Module, query: Matrix, key: Matrix, value: Matrix, **more) -> Attention:
    """The width of a head, and the scale where it is not the usual one, are attributes of the module."""
    words = ("head_dim", "attention_head_size", "key_value_proj_dim")
    head_dim = next(getattr(module, word) for word in words if hasattr(module, word))
    scale = more.get("scale", getattr(module, "scaling", head_dim**-0.5))
    return Attention(name, module, query, key, value, head_dim=head_dim, scale=scale)


def _is_transposed(module: nn.Module) -> bool:
    return any(parent.__name__ == "Conv1D" for parent in type(module).__mro__)


def norm_of(prefix: str, parent: nn.Module, attribute: str) -> NormPlace:
    """Where a norm sits in its parent."""
    return NormPlace(f"{prefix}.{attribute}", parent, attribute)


def has_only(module: nn.Module, *paths: str) -> bool:
    """Whether the module has all these parts, and besides them only what holds no parameters."""
    parts: dict[str, nn.Module] = {}
    for path in paths:
        part: Any = module
        for word in path.split("."):
            part = getattr(part, word, None)
        if not isinstance(part, nn.Module):
            return False
        parts[path] = part
    named = {path.split(".")[0] for path in paths}
    return all(name in named or not any(True for _ in child.parameters()) for name, child in module.named_children())


def class_names(module: nn.Module) -> set[str]:
    """Names of the module's class and its parents: a class that torch swapped in for a parametrization counts too."""
    return {parent.__name__ for parent in type(module).__mro__}
