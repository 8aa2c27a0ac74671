"""The report of a run, or of several side by side: one HTML page made from run folders alone.

The pages are loaded when they are first asked for: matplotlib takes as long to import as many first steps of training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tameformer.report.comparison import write_comparison
    from tameformer.report.page import write_report

__all__ = ["write_comparison", "write_report"]

_HOMES = {"write_comparison": "tameformer.report.comparison", "write_report": "tameformer.report.page"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
