"""What `tame race` shows: its plan, its runs while they run, and the tables at the end."""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tameformer.cli.compare_view import GridProgress, as_rich
from tameformer.studies.cells import State
from tameformer.studies.grid import Cell
from tameformer.studies.race import PAGE
from tameformer.studies.race_page import summary_tables
from tameformer.studies.race_plan import Plan
from tameformer.studies.race_results import RaceResults
from tameformer.studies.workers import Running

MOST_ROWS = 20
"""Of a table in the terminal; the page has all."""


def print_plan(console: Console, plan: Plan, *, run_all: bool) -> None:
    """What will be run for the budget."""
    console.print(
        f"{plan.starts} starts to {plan.share:g} of the run, {plan.continued} to its end: {plan.cost:g} whole runs"
        + (", and the rest to see what stopping misses" if run_all else ""),
        highlight=False,
        soft_wrap=True,
    )


def stage_display(
    console: Console, folder: Path, shown: ExitStack
) -> Callable[[str, Sequence[Cell], Sequence[State]], Callable[[Sequence[Running]], None]]:
    """From the runs of a stage to what shows them while they run; `shown` closes the live display."""

    def on_stage(name: str, cells: Sequence[Cell], ends: Sequence[State]) -> Callable[[Sequence[Running]], None]:
        shown.close()  # the live display of the stage before
        console.print(f"{name}: {len(cells)} runs", highlight=False, soft_wrap=True)
        return shown.enter_context(GridProgress(console, folder, cells, ends=ends)).show

    return on_stage


def print_results(results: RaceResults, folder: Path) -> None:
    """Print the tables, and where the rest is."""
    out = Console(width=None if sys.stdout.isatty() else 120)
    for table in summary_tables(results):
        if table.rows:
            out.print(as_rich(replace(table, rows=table.rows[:MOST_ROWS])))
    if results.best is not None:
        out.print(f"best model: {folder / results.best.name}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"page: {folder / PAGE}", highlight=False, markup=False, soft_wrap=True)
