"""`tame recipes`: what can be trained, one line each."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tameformer.recipes import catalogue


def main(arguments: Sequence[str]) -> int:
    """Print the recipes; returns the exit code."""
    if arguments:
        known = arguments[0] in ("-h", "--help")
        print(
            "usage: tame recipes\n\nLists the recipes of `tame train`; `tame train RECIPE --print_config` shows one whole."
        )
        return 0 if known else 2
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, summary in catalogue.names().items():
        table.add_row(f"[bold]{name}", summary)
    Console().print(table)
    return 0
