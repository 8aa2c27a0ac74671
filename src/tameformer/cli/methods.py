"""`tame methods`: what can make a model stable, one line each."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def main(arguments: Sequence[str]) -> int:
    """Print the methods; returns the exit code."""
    if arguments:
        print(
            "usage: tame methods\n\n"
            "Lists the methods of tame.stabilize(model, METHOD) and of the recipes' key `stabilize`, as in\n"
            "  tame train vit-digits --stabilize '[sigma_reparam]'\n"
            "  tame train vit-digits --stabilize '[{sigma_reparam: {gamma: 1.0}}, z_loss]'"
        )
        return 0 if arguments[0] in ("-h", "--help") else 2
    from tameformer.stabilizers import METHODS

    table = Table(box=None, pad_edge=False)
    for column in ("method", "use it when", "cost", "paper"):
        table.add_column(column, overflow="fold")
    for name, method in METHODS.items():
        table.add_row(f"[bold]{name}", method.use_when, method.cost, method.paper)
    Console().print(table)
    return 0
