"""What `tame compare` shows: its runs while they run, and the tables at the end."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from tameformer.record import EVENTS, RunReader
from tameformer.report.page import duration
from tameformer.report.tables import Table
from tameformer.report.wording import number
from tameformer.studies.cells import SETTLED, State, position, state_of
from tameformer.studies.grid import Cell
from tameformer.studies.results import Results
from tameformer.studies.tables import difference_table, rate_table, result_table, trouble_table
from tameformer.studies.workers import Running

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_LINES = 30.0


class GridProgress:
    """How many runs are done, what runs now with step and loss, and the time left: live, or a line now and then."""

    def __init__(
        self, console: Console, folder: Path, cells: Sequence[Cell], *, ends: Sequence[State] = SETTLED
    ) -> None:
        self.console, self.folder, self.cells, self.ends = console, folder, cells, ends
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._looked = self._told = 0.0
        self._counts = ""
        self._settled: dict[str, str] = {}
        self._max_steps: dict[str, int] = {}
        self._started: float | None = None
        self._done_at_start = 0.0

    def __enter__(self) -> "GridProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, running: Sequence[Running]) -> None:
        """Look at the folders, if it is time, and tell."""
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        busy = {run.cell.name for run in running}
        for cell in self.cells:
            if cell.name not in self._settled and cell.name not in busy:
                state = state_of(self.folder / cell.name)[0]
                if state in self.ends:
                    self._settled[cell.name] = state
        table, done = self._running(running)
        done += len(self._settled)
        if self._started is None:
            self._started, self._done_at_start = now, done
        pace = (done - self._done_at_start) / max(now - self._started, 1e-9)
        left = f"{duration((len(self.cells) - done) / pace)} left" if pace > 0 else ""
        states = list(self._settled.values())
        counts = ", ".join(f"{states.count(state)} {state}" for state in self.ends if state in states)
        line = f"{len(states)} of {len(self.cells)} runs done" + (f" ({counts})" if counts else "")
        if running:
            line += f", {len(running)} running"
        elif len(states) < len(self.cells):
            line += ", waiting for runs of another command"
        if self._live is not None:
            self._live.update(Group(Text(f"{line}  {left}"), table))
        elif counts != self._counts or now - self._told >= SECONDS_BETWEEN_LINES:
            self._counts, self._told = counts, now
            self.console.print(f"{line}  {left}".rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _running(self, running: Sequence[Running]) -> tuple[RichTable, float]:
        """A line each run, and how many whole runs their steps amount to."""
        table = RichTable(box=None, show_header=False, pad_edge=False)
        done = 0.0
        for run in running:
            step, loss = position(run.folder)
            last = self._length(run.folder) if step else None
            done += 0.0 if last is None else step / last
            steps = f"step {step}" + ("" if last is None else f"/{last}")
            table.add_row(Text(run.cell.name), steps, "" if loss is None else f"loss {number(loss)}")
        return table, done

    def _length(self, folder: Path) -> int | None:
        """Steps of the whole run, which its first event tells."""
        if folder.name not in self._max_steps and (folder / EVENTS).is_file():
            for event in RunReader(folder).events():
                if "max_steps" in event:
                    self._max_steps[folder.name] = int(event["max_steps"])
        return self._max_steps.get(folder.name)


def print_results(results: Results, page: Path) -> None:
    """Print the tables, and where the rest is."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    # Two metrics fit a wide terminal; the page has all. Keys are shorter than words.
    narrow = console.width < 100
    rates = rate_table(results, heading=str)
    if narrow:
        rates = _without(rates, {"seeds", "width / first's"})
    shown = [
        result_table(results, results.metrics[: 1 if narrow else 2], heading=str),
        rates,
        difference_table(results),
    ]
    trouble = trouble_table(results)
    rows = tuple(row for row in trouble.rows if row[1] != "diverged")
    for found in (*shown, replace(trouble, rows=rows)):
        if found.rows:
            console.print(as_rich(found))
    console.print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)


def _without(found: Table, names: set[str]) -> Table:
    keep = [index for index, column in enumerate(found.columns) if column not in names]
    rows = tuple(tuple(row[index] for index in keep) for row in found.rows)
    return replace(found, columns=tuple(found.columns[index] for index in keep), rows=rows)


def as_rich(found: Table) -> RichTable:
    """The table as the terminal shows it."""
    shown = RichTable(
        title=Text(found.title, style="bold"),
        title_justify="left",
        caption=Text(found.note),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in found.columns:
        longest = max((len(word) for word in column.split()), default=0)
        shown.add_column(Text(column), overflow="fold", min_width=longest)  # headings break between words only
    for row in found.rows:
        shown.add_row(*map(Text, row))
    return shown
