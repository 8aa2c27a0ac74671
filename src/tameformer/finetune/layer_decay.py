"""Layers nearer to the input learn slower (Howard and Ruder 2018, "ULMFiT", arXiv:1801.06146, section 3.2).

With the rate lr of what is after the layers, the top layer learns with lr * rate, the next with lr * rate^2, and so on; the
embeddings have the lowest. Zhang et al. 2021, arXiv:2006.05987, table 2, use 0.95 for 24 layers; 0.9 suits 12.

Differs from the published code: every parameter of any model is in exactly one group, a tied head learns with the embedding
that it is, and norms and biases are not decayed. The rates stand in the groups themselves, so that any scheduler scales them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tameformer.finetune.places import Place, PlaceOf, places
from tameformer.optim.groups import Rule, Selector, assign, is_matrix


class LayerGroups(list[dict[str, Any]]):
    """Parameter groups for any optimizer; printed, a table of them."""

    def __str__(self) -> str:
        rows = [(group["name"], group["lr"], group["weight_decay"], _count(group)) for group in self]
        width = max(len(name) for name, *_ in rows)
        head = f"{'group':<{width}}  {'rate':>9}  {'decay':>7}  {'parameters':>12}"
        lines = [f"{name:<{width}}  {lr:>9.3g}  {decay:>7g}  {count:>12,}" for name, lr, decay, count in rows]
        return "\n".join([head, *lines])


def layer_decay_groups(
    model: nn.Module,
    rate: float = 0.9,
    *,
    lr: float,
    weight_decay: float = 0.01,
    place_of: PlaceOf = places,
    decays: Selector = is_matrix,
) -> LayerGroups:
    """Parameter groups whose learning rate falls by `rate` from each layer to the one below it.

    Args:
        model: Any model with repeated layers, with its patches applied. What needs no gradient is left out.
        rate: Factor from a layer to the one below, above 0 and at most 1.
        lr: The rate after the layers: norm, pooler, head.
        weight_decay: Of what `decays` takes; 0 for the rest.
        place_of: Where each parameter is, for a model whose structure does not say it.
        decays: Takes what is decayed, by name, owner and parameter; by default matrices, not norms, biases and embeddings.

    Raises:
        ValueError: `rate` is out of range, or `place_of` leaves a parameter out.
        PatchError: The model has no repeated layers.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
        >>> print(layer_decay_groups(model, 0.5, lr=1e-3))
        group                     rate    decay    parameters
        embeddings            0.000125        0            72
        1.layers.0             0.00025     0.01           512
        1.layers.0 no decay    0.00025        0            88
        1.layers.1              0.0005     0.01           512
        1.layers.1 no decay     0.0005        0            88
        head                     0.001     0.01            24
        head no decay            0.001        0             3
    """
    _check_rate(rate)
    if not 0 <= lr < math.inf:
        raise ValueError(f"expected a finite lr of at least 0, got {lr}")
    found = place_of(model)
    missing = [name for name, one in model.named_parameters() if one.requires_grad and name not in found]
    if missing:
        raise ValueError(f"place_of says nothing about {', '.join(missing)}; every parameter needs a place")
    rules = []
    for place in sorted(set(found.values()), key=lambda place: (-place.above, place.layer)):
        settings = {"lr": lr * rate**place.above}
        rules += [
            Rule(place.layer, _at(found, place, decays), {**settings, "weight_decay": weight_decay}),
            Rule(f"{place.layer} no decay", _at(found, place), {**settings, "weight_decay": 0.0}),
        ]
    groups = [group for group in assign(model, rules) if group["params"]]
    for group in groups:  # without decay beside it, the name says enough
        if group["name"].endswith(" no decay") and not any(
            other["name"] == group["name"].removesuffix(" no decay") for other in groups
        ):
            group["name"] = group["name"].removesuffix(" no decay")
    return LayerGroups(groups)


def scale_rates(model: nn.Module, optimizers: Sequence[Optimizer], rate: float, *, place_of: PlaceOf = places) -> None:
    """As `layer_decay_groups`, for optimizers that exist: each group is cut by layers, and its rate scaled in each.

    Call it before the first step and before a scheduler takes the rates.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
        >>> import torch
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=8.0)
        >>> scale_rates(model, [optimizer], 0.5)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('embeddings', 1.0), ('1.layers.0', 2.0), ('1.layers.1', 4.0), ('head', 8.0)]
    """
    _check_rate(rate)
    found = place_of(model)
    names = {id(one): name for name, one in model.named_parameters()}
    for optimizer in optimizers:
        given, optimizer.param_groups[:] = list(optimizer.param_groups), []
        for group in given:
            by_place: dict[Place, list[nn.Parameter]] = {}
            for one in group["params"]:
                by_place.setdefault(found[names[id(one)]], []).append(one)
            for place in sorted(by_place, key=lambda place: (-place.above, place.layer)):
                part = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                name = f"{place.layer} {group['name']}" if "name" in group else place.layer
                told = [names[id(one)] for one in by_place[place]]
                more = {"param_names": told} if "param_names" in group else {}
                lr = group["lr"] * rate**place.above
                optimizer.add_param_group({**part, **more, "name": name, "lr": lr, "params": by_place[place]})


def _check_rate(rate: float) -> None:
    if not 0 < rate <= 1:
        raise ValueError(f"expected a rate above 0 and at most 1, got {rate}; it is the factor from layer to layer")


def _at(found: Mapping[str, Place], place: Place, also: Selector | None = None) -> Selector:
    def selects(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
        return found.get(name) == place and (also is None or also(name, module, parameter))

    return selects


def _count(group: Mapping[str, Any]) -> int:
    params: Sequence[nn.Parameter] = group["params"]
    return sum(one.numel() for one in params)
