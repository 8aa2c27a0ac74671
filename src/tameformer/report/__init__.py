"""The report of a run, or of several side by side: one HTML page made from run folders alone.

The page is loaded when it is first asked for: matplotlib takes as long to import as many first steps of training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tameformer.report.page import write_comparison, write_report

__all__ = ["write_comparison", "write_report"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("tameformer.report.page"), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
