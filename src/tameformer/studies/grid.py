"""The grid of a comparison: which values are varied, and the cells that all of them and the seeds make up."""

import hashlib
import itertools
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tameformer import config as configuration
from tameformer.errors import ConfigError
from tameformer.recipes import catalogue
from tameformer.recipes.catalogue import Recipe

RATE = "optim.peak_lr"
NONE = "none"
# The comparison sets these itself.
_OWN = {"seed": "--seeds", "output_dir": "--output_dir", "loop.eval_on_start": "nothing: it is always on"}
_UNSAFE = re.compile(r"[^\w.+=,-]+")
_LONGEST_NAME = 120  # of 255 that file systems allow, since a checkpoint's temporary files add to it


@dataclass(frozen=True)
class Choice:
    """One value of a varied key."""

    label: str
    """As tables and folders show it."""
    argument: str
    """As `tame train` reads it."""
    number: float | None = None
    """The value itself, where it is a number."""


@dataclass(frozen=True)
class Factor:
    """A key and the values it takes; the first value is what the others are compared with."""

    key: str
    choices: tuple[Choice, ...]

    @property
    def name(self) -> str:
        """The key's last part: `peak_lr`."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    choices: tuple[Choice, ...]
    """One choice a factor, in the order of the factors."""
    seed: int
    name: str
    """Folder of the run, inside that of the comparison."""
    arguments: tuple[str, ...]
    """What the run is started with, beyond the arguments that all runs share."""


@dataclass(frozen=True)
class Grid:
    """Everything that says which runs there are."""

    recipe: str
    """As given: a name, or the path of a YAML file."""
    arguments: tuple[str, ...]
    """Changes of the recipe that all runs share, as `tame train` reads them."""
    factors: tuple[Factor, ...]
    seeds: tuple[int, ...]

    @property
    def rates(self) -> Factor | None:
        """The factor that is the learning rate, if one is."""
        return next((factor for factor in self.factors if factor.key == RATE), None)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All runs, seed by seed, so that a comparison cut short is one with fewer seeds."""
        every = itertools.product(*(factor.choices for factor in self.factors))
        pairs = itertools.product(self.seeds, list(every))
        return tuple(self._cell(choices, seed) for seed, choices in pairs)

    def _cell(self, choices: tuple[Choice, ...], seed: int) -> Cell:
        names = [factor.name for factor in self.factors]
        parts = [
            f"{factor.name if names.count(factor.name) == 1 else factor.key}={choice.label}"
            for factor, choice in zip(self.factors, choices, strict=True)
        ]
        arguments = [f"--{factor.key}={choice.argument}" for factor, choice in zip(self.factors, choices, strict=True)]
        return Cell(choices, seed, folder_name([*parts, f"seed={seed}"]), (*arguments, f"--seed={seed}"))

    def resolved(self, cell: Cell) -> Recipe:
        """The cell's complete configuration.

        Raises:
            ConfigError: Unknown key or bad value.
        """
        return catalogue.parse(self.recipe, [*self.arguments, *cell.arguments])


def folder_name(parts: Sequence[str]) -> str:
    """One name for a folder from `key=value` parts; what a file system or a shell may dislike is replaced, told by a hash.

    Example:
        >>> folder_name(["peak_lr=0.001", "stabilize=qk_norm+admin", "seed=0"])
        'peak_lr=0.001,stabilize=qk_norm+admin,seed=0'
        >>> folder_name(["path=/data/a b", "seed=0"])
        'path=_data_a_b,seed=0-ea377a12'
    """
    exact = ",".join(parts)
    name = _UNSAFE.sub("_", exact)[:_LONGEST_NAME]
    return name if name == exact else f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def make_grid(recipe: str, arguments: Sequence[str], vary: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> Grid:
    """The grid, with every configuration in it tried.

    Args:
        recipe: A name that `tame recipes` lists, or the path of a YAML file.
        arguments: Changes that all runs share, such as `--max_steps=500`.
        vary: Keys, and the values each shall take, as texts or as plain values.
        seeds: One run a seed of each combination.

    Raises:
        ConfigError: Unknown recipe, key or value, or nothing to compare.
    """
    config_class = type(catalogue.parse(recipe, arguments).config)
    known = configuration.field_types(config_class)
    for key in vary:
        if key in _OWN:
            raise ConfigError(f"{key} cannot be varied: use {_OWN[key]}")
        configuration.check_keys([key], config_class)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds must be at least one, and distinct, got {list(seeds)}")
    factors = tuple(Factor(key, _choices(key, values, known[key])) for key, values in vary.items())
    if not factors and len(seeds) < 2:
        raise ConfigError("there is nothing to compare: give --vary KEY=VALUE,VALUE, or several --seeds")
    grid = Grid(recipe, tuple(arguments), factors, tuple(seeds))
    for cell in grid.cells:
        if cell.seed == seeds[0]:
            grid.resolved(cell)
    return grid


def _choices(key: str, values: Sequence[Any], kind: Any) -> tuple[Choice, ...]:
    several = typing.get_origin(kind) is tuple
    choices = [_choice(value, several) for value in values]
    if key == RATE:
        for choice in choices:
            if choice.number is None or not (math.isfinite(choice.number) and choice.number > 0):
                raise ConfigError(f"{key} expects positive numbers, got {choice.label}")
        choices.sort(key=lambda choice: choice.number or 0.0)
    labels = [choice.label for choice in choices]
    if not labels or len(set(labels)) < len(labels):
        raise ConfigError(f"{key}: expected distinct values to compare, got {', '.join(labels) or 'none'}")
    return tuple(choices)


def _choice(value: Any, several: bool) -> Choice:
    """A value as given on the command line or in Python; keys that hold a list also take `none` and `a+b`."""
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    if several and not text.startswith(("[", "{")):
        items = [] if text.lower() in (NONE, "null", "") else text.split("+")
        return Choice("+".join(items) or NONE, json.dumps(items))
    if several and not isinstance(value, str):
        plain = all(isinstance(item, str) for item in value)
        return Choice("+".join(value) or NONE if plain else text, text)
    if several and text.startswith("{"):
        return Choice(text, f"[{text}]")
    number = _number(text)
    return Choice(text if number is None else f"{number:.10g}", text, number)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def split_values(text: str) -> list[str]:
    """The values of `a,b,c`; a comma inside brackets or quotes does not separate.

    Example:
        >>> split_values("none,[a, b],{z_loss: {coefficient: 1e-4, x: 2}}")
        ['none', '[a, b]', '{z_loss: {coefficient: 1e-4, x: 2}}']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def parse_vary(items: Sequence[str]) -> dict[str, list[str]]:
    """The keys and values of several `KEY=VALUE,VALUE`.

    Raises:
        ConfigError: A text of another form, or a key twice.

    Example:
        >>> parse_vary(["optim.peak_lr=1e-3,3e-3", "stabilize=none,admin"])
        {'optim.peak_lr': ['1e-3', '3e-3'], 'stabilize': ['none', 'admin']}
    """
    vary: dict[str, list[str]] = {}
    for item in items:
        key, equals, values = item.partition("=")
        key = key.strip().removeprefix("--")
        if not equals or not values.strip():
            raise ConfigError(f"--vary expects KEY=VALUE,VALUE, such as optim.peak_lr=1e-3,3e-3, got {item}")
        if key in vary:
            raise ConfigError(f"--vary {key} is given twice; list all its values once, separated by commas")
        vary[key] = split_values(values)
    return vary


def parse_seeds(text: str) -> list[int]:
    """The seeds of `3` (that many: 0, 1, 2) or of a list `0,5,7`.

    Raises:
        ConfigError: A text of another form.

    Example:
        >>> parse_seeds("3"), parse_seeds("0,5,7"), parse_seeds("5,")
        ([0, 1, 2], [0, 5, 7], [5])
    """
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
        seeds = numbers if "," in text else list(range(numbers[0]))
    except (ValueError, IndexError):
        seeds = []
    if not seeds or min(seeds) < 0:
        raise ConfigError(f"--seeds expects how many, such as 3, or a list, such as 0,5,7, got {text}")
    return seeds
