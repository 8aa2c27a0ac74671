"""Which recipes there are, and how a name, a file and a few changes become one complete configuration.

A task is code (a configuration class and a builder); a recipe is a YAML file that names its task and holds values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tameformer import config as configuration
from tameformer.errors import ConfigError

FOLDER = Path(__file__).parent / "yaml"
TASKS = {
    "vision": "tameformer.recipes.vision",
    "contrastive": "tameformer.recipes.contrastive",
    "graph": "tameformer.recipes.graph",
    "hierarchical": "tameformer.recipes.hierarchical",
    "set": "tameformer.recipes.set",
    "masked-image": "tameformer.recipes.masked_image",
    "char-lm": "tameformer.recipes.char_lm",
    "formal": "tameformer.recipes.formal",
    "lm": "tameformer.recipes.lm",
    "speech": "tameformer.recipes.speech",
    "translation": "tameformer.recipes.translation",
    "video": "tameformer.recipes.video",
    "masked-lm": "tameformer.recipes.masked_lm",
    "text-classification": "tameformer.recipes.text_classification",
}
DEFAULT = "vit-digits"


@dataclass(frozen=True)
class Recipe:
    """A name, a task, and the complete configuration."""

    name: str
    task: str
    config: Any

    @property
    def build(self) -> Callable[[Any, Path], Any]:
        """The task's builder: from the configuration and the run folder to a run."""
        return import_module(TASKS[self.task]).build

    def to_yaml(self) -> str:
        """The configuration as a recipe file: `tame train` repeats the run from it."""
        return configuration.to_yaml(self.config, task=self.task)


def names() -> dict[str, str]:
    """Every recipe that comes with the package, with the sentence its file begins with."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for path in sorted(FOLDER.glob("*.yaml"))
    }


def find(recipe: str) -> Path:
    """The file of a recipe: one of ours by name, or a path.

    Raises:
        ConfigError: There is none; the nearest name is given.
    """
    if recipe in names():
        return FOLDER / f"{recipe}.yaml"
    path = Path(recipe)
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    near = configuration.nearest(recipe, list(names()))
    raise ConfigError(
        f"there is no recipe {recipe}; did you mean {near}? (`tame recipes` lists them; a path to a .yaml works, too)"
    )


def resolve(recipe: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe's configuration with a few values changed.

    Args:
        recipe: A name from `names`, or the path of a YAML file or of a run folder.
        overrides: Values by key, nested or dotted.

    Raises:
        ConfigError: Unknown recipe, task, key or value.
    """
    name, task, config_class, values = _read(recipe)
    base = configuration.build(config_class, values)
    return Recipe(name, task, configuration.build(config_class, overrides, base=base) if overrides else base)


def parse(recipe: str, arguments: Sequence[str], *, also: Sequence[str] = ()) -> Recipe:
    """As `resolve`, with changes as command-line arguments of the form `--a.b=value`."""
    name, task, config_class, values = _read(recipe)
    base = configuration.build(config_class, values)
    prog = f"tame train {recipe}"
    return Recipe(name, task, configuration.parse(config_class, arguments, base=base, prog=prog, also=also))


def with_values(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with top-level values replaced."""
    return replace(recipe, config=replace(recipe.config, **values))


def _read(recipe: str) -> tuple[str, str, type, dict[str, Any]]:
    path = find(recipe)
    values = configuration.read_yaml(path)
    task = values.pop("task", None)
    if task not in TASKS:
        raise ConfigError(f"{path}: `task` must be one of {', '.join(TASKS)}, got {task}")
    # A run folder's own config.yaml takes the name of the run, a recipe file its own.
    name = path.parent.name if path.name == "config.yaml" else path.stem
    return name, task, import_module(TASKS[task]).Config, values
