"""One line in other people's trainers, and measurements to other people's trackers; each loaded when it is first used."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tameformer.integrations import lightning, trackers, transformers

__all__ = ["lightning", "trackers", "transformers"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
