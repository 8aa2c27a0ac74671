"""Configurations: frozen dataclasses <-> YAML files and `--a.b=value`. No torch.

A configuration class lives beside what it configures. Here is only the way between such a class and text, and the refusal
of whatever does not fit, with the nearest name that would have.
"""

import dataclasses
import difflib
import functools
import itertools
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tameformer.errors import ConfigError

Config = TypeVar("Config")
TAG = "architecture"
"""The key that tells the members of a union of configurations apart: a `Literal` of the names that a member answers to."""


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys.

    Example:
        >>> flatten({"seed": 1, "optim": {"peak_lr": 0.1}, "data.path": "a"})
        {'seed': 1, 'optim.peak_lr': 0.1, 'data.path': 'a'}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def field_types(config_class: type) -> dict[str, Any]:
    """Every key of a configuration class, dotted, with its type."""
    return dict(_walk(config_class, ""))


def _walk(config_class: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind = hints[field.name]
        members = _members(kind)
        if dataclasses.is_dataclass(kind):
            yield from _walk(typing.cast(type, kind), f"{prefix}{field.name}.")
        elif members:
            for member in dict.fromkeys(members.values()):
                yield from _walk(member, f"{prefix}{field.name}.")
            yield f"{prefix}{field.name}.{TAG}", typing.Literal[tuple(members)]
        else:
            yield f"{prefix}{field.name}", kind


def _members(kind: Any) -> dict[str, type]:
    """The configuration classes of a union by the names they answer to; nothing for any other type."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else ()
    if not parts or not all(dataclasses.is_dataclass(part) for part in parts):
        return {}
    return {name: part for part in parts for name in typing.get_args(typing.get_type_hints(part)[TAG])}


def _narrowed(config_class: type, given: Mapping[str, Any], base: Any) -> type:
    """The class with one member for each of its unions: what `given` names, else what the base holds or the default is.

    Raises:
        ConfigError: There is no member of that name.
    """
    hints, chosen = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        members = _members(hints[field.name])
        if not members:
            continue
        key = f"{field.name}.{TAG}"
        factory: Any = field.default_factory
        held = factory() if base is None else getattr(base, field.name)
        name = given.get(key, getattr(held, TAG))
        if name not in members:
            raise ConfigError(f"{key} must be one of {', '.join(members)}, got {name}")
        chosen.append((field.name, members[name], name))
    return _with_members(config_class, tuple(chosen)) if chosen else config_class


@functools.cache
def _with_members(config_class: type, chosen: tuple[tuple[str, type, str], ...]) -> type:
    fields = [
        (field, kind, dataclasses.field(default_factory=functools.partial(kind, **{TAG: name})))
        for field, kind, name in chosen
    ]
    return dataclasses.make_dataclass(config_class.__name__, fields, bases=(config_class,), frozen=True, kw_only=True)


_LISTS = (list, Sequence)


def plain_part(kind: Any) -> Any:
    """The part of a type whose values a configuration file can hold; None where there is none but null.

    Example:
        >>> plain_part(bool | typing.Callable[[int], bool]), plain_part(typing.Callable[[int], bool] | None)
        (<class 'bool'>, None)
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        parts = [part for part in map(plain_part, arguments) if part is not None]
        # `null` alone is nothing that one would set.
        return typing.Union[(*parts, *(part for part in arguments if part is types.NoneType))] if parts else None
    if origin in _LISTS:
        return kind if plain_part(arguments[0]) == arguments[0] else None
    return kind if origin is typing.Literal or kind in (bool, int, float, str) else None


def accepts(kind: Any, value: Any) -> bool:
    """Whether a value from a configuration file is of a plain type, see `plain_part`; a whole number is a float, too.

    Example:
        >>> accepts(float | None, 1), accepts(int, True), accepts(Sequence[float], [1, 2.5]), accepts(bool, "yes")
        (True, False, True, False)
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(argument, value) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin in _LISTS:
        return isinstance(value, list) and all(accepts(arguments[0], item) for item in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(arguments) and all(map(accepts, arguments, value))
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)  # null has the kind NoneType


def type_name(kind: Any) -> str:
    """A type in the words of the configuration file.

    Example:
        >>> type_name(int | None), type_name(typing.Literal["adamw", "sgd"]), type_name(tuple[float, float])
        ('int or null', 'one of adamw, sgd', 'a list of 2 x float')
        >>> type_name(Sequence[float])
        'a list of float'
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return (
            f"a list of {type_name(arguments[0])}"
            if arguments[-1] is Ellipsis
            else f"a list of {len(arguments)} x {type_name(arguments[0])}"
        )
    if origin in _LISTS:
        return f"a list of {type_name(arguments[0])}"
    return "null" if kind is types.NoneType else getattr(kind, "__name__", str(kind))


def check_keys(keys: Sequence[str], config_class: type, *, also: Sequence[str] = ()) -> None:
    """Refuse a key that the configuration does not have, with the nearest one that it has.

    Raises:
        ConfigError: A key is unknown.
    """
    known = [*field_types(config_class), *also]
    for key in keys:
        if key not in known:
            inner = [name for name in known if name.startswith(f"{key}.")]
            if inner:
                raise ConfigError(f"{key} is a section, not a value; set one of its keys, such as {inner[0]}")
            raise ConfigError(
                f"unknown key {key}; did you mean {nearest(key, known)}? (`--print_config` lists all keys)"
            )


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that is spelled most like the one given; a key's last part counts when nothing else is near.

    Example:
        >>> nearest("optim.peek_lr", ["optim.peak_lr", "seed"]), nearest("peak_lr", ["optim.peak_lr", "seed"])
        ('optim.peak_lr', 'optim.peak_lr')
    """
    last = {candidate.rpartition(".")[2]: candidate for candidate in known}
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    close = close or [last[part] for part in difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.6)]
    return (close or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]


def build(config_class: type[Config], values: Mapping[str, Any], *, base: Config | None = None) -> Config:
    """A configuration from nested or dotted values; what is not given comes from `base`, else from the class's defaults.

    Where `architecture` names another member of a union than the base holds, the base's values remain for the keys that
    both members have.

    Args:
        config_class: A frozen dataclass, possibly nested.
        values: Values by key; strings are read as YAML would read them.
        base: The configuration to change.

    Raises:
        ConfigError: Unknown key, a value of the wrong type, or values that contradict each other.
    """
    given = flatten(values)
    narrowed = _narrowed(config_class, given, base)
    check_keys(list(given), narrowed)
    parser = _parser(narrowed, base)
    return _instantiate(parser, config_class, narrowed, lambda: parser.parse_object(_nest(given)))


def parse(
    config_class: type[Config], arguments: Sequence[str], *, base: Config, prog: str, also: Sequence[str] = ()
) -> Config:
    """A configuration from command-line arguments of the form `--a.b=value` or `--a.b value`.

    Args:
        config_class: A frozen dataclass, possibly nested.
        arguments: The arguments; `--help` prints every key with its meaning and exits.
        base: Where values come from that are not given.
        prog: The command's name in the help text.
        also: Option names that the caller handles, for the nearest-name suggestion.

    Raises:
        ConfigError: As for `build`.
    """
    keys = [argument[2:].split("=", 1)[0] for argument in arguments if argument.startswith("--")]
    narrowed = _narrowed(config_class, dict(_tags(arguments)), base)
    check_keys([key for key in keys if key != "help"], narrowed, also=also)
    parser = _parser(narrowed, base, prog=prog, described=not {"-h", "--help"}.isdisjoint(arguments))
    return _instantiate(parser, config_class, narrowed, lambda: parser.parse_args(list(arguments)))


def to_yaml(config: Any, **first: Any) -> str:
    """The configuration as YAML; `first` holds keys to put before it."""
    plain = _plain({**first, **dataclasses.asdict(config)})
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, width=120)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; tags and anything but plain values are refused.

    Raises:
        ConfigError: The file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not plain YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold keys and values (`optim:` ...), got {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text; this reads it as the number everybody means."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = _plain(value)
    return nested


def _tags(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The choices of members among command-line arguments."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        key, is_joined, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and key.endswith(f".{TAG}"):
            yield key, value if is_joined else following


def _kept(config_class: type, base: Any) -> Iterable[tuple[str, Any]]:
    """The base's values for the keys that the class has; where a member of a union was exchanged, those that still fit."""
    known = field_types(config_class)
    for field in dataclasses.fields(typing.cast(Any, config_class)):
        value, kind = getattr(base, field.name), typing.get_type_hints(config_class)[field.name]
        values = flatten(
            {field.name: dataclasses.asdict(typing.cast(Any, value)) if dataclasses.is_dataclass(value) else value}
        )
        exchanged = dataclasses.is_dataclass(kind) and type(value) is not kind
        for key, one in values.items():
            if not exchanged or (key != f"{field.name}.{TAG}" and key in known and accepts(known[key], _plain(one))):
                yield key, one


def _parser(config_class: type, base: Any, *, prog: str = "tame train", described: bool = False):
    # Imported here: reading a finished run needs no command line, and some machines that only train lack the package.
    import jsonargparse

    # Reading the fields' doc strings takes a third of the time, and only the help text shows them.
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=described)
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_class_arguments(config_class, None, fail_untyped=True)
    if base is not None:
        parser.set_defaults(dict(_kept(config_class, base)))
    return parser


def _instantiate(parser: Any, config_class: type[Config], narrowed: type, read: Any) -> Config:
    import argparse

    known = field_types(narrowed)
    try:
        values = parser.instantiate(read())
        return config_class(
            **{field.name: values[field.name] for field in dataclasses.fields(typing.cast(Any, config_class))}
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except argparse.ArgumentError as error:
        found = re.search(r'key "([\w.]+)"', str(error))
        if found is None or found[1] not in known:
            raise ConfigError(str(error)) from error
        got = re.search(r"(?:Got value|Given value): (.*)", str(error))
        shown = got[1] if got else "another"
        raise ConfigError(f"{found[1]} expects {type_name(known[found[1]])}, got {shown}") from error
