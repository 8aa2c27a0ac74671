"""Which parameters share optimizer settings: an ordered list of rules, first match wins, nobody left out.

Grouping reads the model and never changes it. The learning rates stand in the groups themselves (`lr`), so that they hold
under any scheduler and in any loop.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

Selector = Callable[[str, nn.Module, nn.Parameter], bool]
"""Whether a rule takes a parameter, from its full name, the module that owns it, and itself."""

# Weight decay pulls matrices toward zero, where zero means "no effect". For a norm's scale, an embedding or a bias it means
# something else, so that they are left alone (Loshchilov and Hutter 2017, arXiv:1711.05101, as practised since GPT-2).
_MATRIX_OWNERS = (
    nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase,
)  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """Settings for the parameters that `selects` takes and no earlier rule did."""

    name: str
    selects: Selector
    settings: Mapping[str, Any] = field(default_factory=dict)


def is_matrix(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """True for the weights of linear and recurrent layers, convolutions and attention projections, also parametrized ones.

    A parametrization may know better: with an attribute `decayed_parameters` it names those of its parameters that weight
    decay is meant for, and "original" among them means the weight that it is computed from.
    """
    *_, attribute, local = ("", *name.split("."))
    said = _said(module)
    if said is not None:
        return local in said
    if local.startswith("original") and parametrize.is_parametrized(module, attribute):
        chain = module.parametrizations[attribute]  # pyright: ignore
        heard = [said for part in chain if (said := _said(part)) is not None]
        if heard:
            return any("original" in names for names in heard)
    is_owner = isinstance(module, _MATRIX_OWNERS) or any(one.__name__ == "Conv1D" for one in type(module).__mro__)
    return parameter.ndim >= 2 and is_owner  # `Conv1D` is the transposed linear layer of Hugging Face's GPT-2


def _said(part: Any) -> Sequence[str] | None:
    """What a parametrization says that weight decay is meant for."""
    return getattr(part, "decayed_parameters", None)


def is_any(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """True for every parameter: the last rule."""
    return True


def assign(model: nn.Module, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """Every trainable parameter of the model in the group of the first rule that selects it; groups may stay empty.

    Args:
        model: The model; a tied parameter counts once, under its first name.
        rules: Tried in order.

    Returns:
        One dict a rule with `name`, `params`, `param_names` and the rule's settings.

    Raises:
        ValueError: A parameter that no rule selects.
    """
    groups: list[dict[str, Any]] = [
        {"name": rule.name, "params": [], "param_names": [], **rule.settings} for rule in rules
    ]
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        owner = _owner(model, module_name, module)
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            name = f"{module_name}.{parameter_name}" if module_name else parameter_name
            for rule, group in zip(rules, groups, strict=True):
                if rule.selects(name, owner, parameter):
                    group["params"].append(parameter)
                    group["param_names"].append(name)
                    break
            else:
                raise ValueError(f"no rule selects parameter {name}; end the rules with one that takes everything")
    return groups


def _owner(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """The layer that a parametrized weight belongs to, where torch keeps the weight in a list beside it."""
    if isinstance(module, parametrize.ParametrizationList):
        return model.get_submodule(name.rpartition("parametrizations.")[0].rstrip("."))
    return module


def parameter_groups(model: nn.Module, rules: Sequence[Rule]) -> list[dict[str, Any]]:
    """As `assign`, for rules that are each meant to select something.

    Raises:
        ValueError: A parameter that no rule selects, or a rule that selects none.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
        >>> groups = parameter_groups(model, [Rule("decay", is_matrix, {"weight_decay": 0.1}), Rule("rest", is_any)])
        >>> [(group["name"], group["param_names"]) for group in groups]
        [('decay', ['1.weight']), ('rest', ['0.weight', '1.bias'])]
    """
    groups = assign(model, rules)
    for group in groups:
        if not group["params"]:
            raise ValueError(f"rule {group['name']} selects no parameter of {type(model).__name__}; mend its selector")
    return groups


def decay_rules(weight_decay: float) -> list[Rule]:
    """Weight decay on matrices only; biases, norms, embeddings and other vectors are left alone."""
    return [Rule("decay", is_matrix, {"weight_decay": weight_decay}), Rule("no_decay", is_any, {"weight_decay": 0.0})]


def decay_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The groups of `decay_rules` that have parameters.

    Example:
        >>> [group["weight_decay"] for group in decay_groups(nn.Linear(2, 2), weight_decay=0.1)]
        [0.1, 0.0]
    """
    return [group for group in assign(model, decay_rules(weight_decay)) if group["params"]]
