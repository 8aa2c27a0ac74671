"""Which modules of a model a method applies to."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from tameformer.errors import PatchError

Selector = Callable[[str, nn.Module], bool]
"""Whether to take a module, from its name in the model and the module."""


def select(model: nn.Module, where: Selector, *, looked_for: str) -> dict[str, nn.Module]:
    """The modules that `where` takes, by name, each once.

    Raises:
        PatchError: There is none; it says what was looked for and what kinds of modules there are.

    Example:
        >>> list(select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), is_linear, looked_for="linear layers"))
        ['0']
    """
    found = {name: module for name, module in model.named_modules() if where(name, module)}
    if not found:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        raise PatchError(
            f"{type(model).__name__} has nothing to change: looked for {looked_for}, found {', '.join(kinds)}; "
            f"give another selector with where="
        )
    return found


def is_linear(name: str, module: nn.Module) -> bool:
    """Linear layers, whether or not their weight is stored transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def named(*patterns: str) -> Selector:
    """Modules whose name matches one of the patterns of a shell, such as `"layers.*.attention.query"`.

    Example:
        >>> named("layers.*.key")("layers.3.key", nn.Linear(1, 1))
        True
    """
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)
