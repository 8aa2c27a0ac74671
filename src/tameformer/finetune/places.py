"""How far each parameter of a model is from its input and from its output, counted in layers; by structure, not by class.

The layers are the members of the model's lists of alike modules (`patch.blocks`). Lists that hang side by side in one module
run one after the other; lists in different modules, such as an encoder and a decoder, are counted side by side, each from its
own top. What is outside of lists belongs to the nearest: before it, such as embeddings, or after it, such as a norm, a pooler
or a head. Order of definition says which, and the name where it says more.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch import blocks

# BART's embedding norm is defined after its layers and runs before them; an attention pooling is often defined before them.
_BEFORE = re.compile(r"embed|position|stem|patch|token$")
_AFTER = re.compile(r"pool|logit_scale")


@dataclass(frozen=True)
class Place:
    """Where a parameter is."""

    layer: str
    """The layer it is in; "embeddings" before all layers, "head" after all."""
    below: int
    """Layers that run before it in its list; -1 for what runs before the first."""
    above: int
    """How far from the output: 0 after the last layer, 1 in the last, one more a layer, the most in the embeddings."""


PlaceOf = Callable[[nn.Module], dict[str, Place]]
"""From a model to the place of each of its parameters by name."""


def places(model: nn.Module) -> dict[str, Place]:
    """The place of each parameter by name; a tied one has its first name only, so that a tied head is in the embeddings.

    Raises:
        PatchError: The model has no list of layers.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8))
        >>> found = places(encoder)
        >>> found["layers.2.linear1.bias"], found["norm.weight"].above
        (Place(layer='layers.2', below=2, above=1), 0)
    """
    stacks = _stacks(model)
    if not stacks:
        raise PatchError(
            f"{type(model).__name__} has no repeated layers, of which some could learn slower than others; say where each "
            f"parameter is with place_of="
        )
    deepest = 1 + max(len(members) for members in stacks.values())
    order = [name for name, _ in model.named_parameters()]
    inside: dict[str, Place] = {}
    for members in stacks.values():
        for below, layer in enumerate(members):
            place = Place(layer, below, len(members) - below)
            inside |= {name: place for name in order if name.startswith(f"{layer}.")}
    first = {
        path: next((number for number, name in enumerate(order) if name.startswith(f"{members[0]}.")), 0)
        for path, members in stacks.items()
    }
    before, after = Place("embeddings", -1, deepest), Place("head", deepest, 0)
    found = {}
    for number, name in enumerate(order):
        if name in inside:
            found[name] = inside[name]
        elif _AFTER.search(name):
            found[name] = after
        else:
            runs_before = _BEFORE.search(name) or number < min(first[path] for path in _nearest(name, stacks))
            found[name] = before if runs_before else after
    return found


def num_layers(found: dict[str, Place]) -> int:
    """Layers of the longest list."""
    return max(place.above for place in found.values() if place.below >= 0 and place.above)


def _stacks(model: nn.Module) -> dict[str, list[str]]:
    """The layers, in order, of each module that lists of layers hang in."""
    stacks: dict[str, list[str]] = {}
    for name in blocks(model):
        holder = name.rpartition(".")[0].rpartition(".")[0]
        stacks.setdefault(holder, []).append(name)
    return stacks


def _nearest(name: str, stacks: dict[str, list[str]]) -> list[str]:
    """The stacks that share the most of their path with the name."""
    words = name.split(".")

    def shared(path: str) -> int:
        return next(
            (place for place, (a, b) in enumerate(zip(path.split("."), words, strict=False)) if a != b or not path),
            min(len(path.split(".")), len(words)) if path else 0,
        )

    most = max(map(shared, stacks))
    return [path for path in stacks if shared(path) == most]
