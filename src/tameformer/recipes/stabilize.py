"""The key `stabilize` of a recipe: methods by name, some with settings, checked before anything is built, and applied."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_type_hints

from torch import nn

from tameformer.config import accepts, nearest, plain_part, type_name
from tameformer.patch import PatchHandle
from tameformer.stabilizers import METHODS, stabilize
from tameformer.stabilizers.shortcut_profile import Masks
from tameformer.training.step import Batch, Loss

PROFILE = "profile.json"
"""In the run folder: the settings that a profile gave, by method. A resumed run takes them from there and profiles no more."""
Settings = Mapping[str, Any]


def methods_of(items: Sequence[Any]) -> list[tuple[str, Settings]]:
    """Names with settings, from names and mappings of one name to its settings.

    Raises:
        ValueError: An unknown method or setting, with the nearest one, or a value of the wrong type.

    Example:
        >>> methods_of(["z_loss", {"deepnorm": {"start": "xavier"}}])
        [('z_loss', {}), ('deepnorm', {'start': 'xavier'})]
    """
    found: list[tuple[str, Settings]] = []
    for item in items:
        if not isinstance(item, str) and not (isinstance(item, Mapping) and len(item) == 1):
            got = ", ".join(map(str, item)) if isinstance(item, Mapping) else repr(item)
            raise ValueError(f"stabilize: expected one method an item, got {got or 'none'}; put each into its own")
        name, settings = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        if name not in METHODS:
            near = nearest(str(name), list(METHODS))
            raise ValueError(f"stabilize: there is no method {name}; did you mean {near}? `tame methods` lists them")
        _check(name, settings)
        found.append((name, settings))
    return found


def settings_of(method: str) -> dict[str, Any]:
    """The settings of a method that a configuration can hold, with their types.

    Example:
        >>> list(settings_of("z_loss"))
        ['coefficient', 'vocab_size']
    """
    verb = METHODS[method].apply
    hints = get_type_hints(verb)
    kinds = {name: plain_part(hints[name]) for name in inspect.signature(verb).parameters}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _check(method: str, settings: Any) -> None:
    known = settings_of(method)
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"stabilize: expected settings of {method} by name, such as {{{method}: {{{next(iter(known), 'NAME')}: ...}}}}, "
            f"got {settings!r}; without settings write {method} alone"
        )
    for name, value in settings.items():
        if name not in known:
            if name in inspect.signature(METHODS[method].apply).parameters:
                raise ValueError(f"stabilize: {name} of {method} takes Python objects, which no configuration can hold")
            suggestion = f"did you mean {nearest(str(name), list(known))}?" if known else "it has none"
            raise ValueError(f"stabilize: {method} has no setting {name}; {suggestion}")
        if not accepts(known[name], value):
            raise ValueError(f"stabilize: {name} of {method} expects {type_name(known[name])}, got {value!r}")


def apply_methods(
    model: nn.Module,
    methods: Sequence[tuple[str, Settings]],
    loss: Loss,
    *,
    batches: Callable[[], Iterable[Batch]],
    mask: Callable[[Batch], Masks],
    profiled: Mapping[str, Settings],
) -> tuple[list[PatchHandle], Loss, dict[str, Settings]]:
    """Change a model and its loss, in order, before its optimizers exist.

    Args:
        model: Fresh.
        methods: From `methods_of`.
        loss: The loss of a batch.
        batches: The first batches of the run, for methods that profile the model; asked for only then.
        mask: From a batch to True at real tokens, by side.
        profiled: What profiles have given already.

    Returns:
        The handles on the model, the loss to train with, and what profiles gave, `profiled` included.
    """
    handles, trained, gave = [], loss, dict(profiled)
    for name, settings in methods:
        method = METHODS[name]
        if method.on_loss is not None:
            trained = method.on_loss(trained, **settings)
            continue
        if method.instead_of_batches and not settings.keys() & set(method.instead_of_batches):
            settings = gave.get(name) or {**settings, "batches": batches(), "call": loss, "mask": mask}
        handles.append(stabilize(model, name, **settings))
        if "batches" in settings:
            gave[name] = handles[-1].settings
    return handles, trained, gave
