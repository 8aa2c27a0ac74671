"""`tame compare RECIPE --vary a.b=1,2 [--seeds 3]`: runs side by side."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

USAGE = """\
usage: tame compare RECIPE --vary KEY=VALUE,VALUE [--vary ...] [--seeds 3] [--a.b=value ...]

Trains RECIPE with every combination of the values and every seed, several runs at a time, and compares what they reach:
means with 95 % intervals over the seeds, diverged runs, paired differences to the first value, and, when optim.peak_lr is
varied, how sensitive each variant is to it and which rates it can use.

  --vary KEY=VALUE,VALUE    a key of the recipe and its values; the first one is what the others are compared with.
                            For `stabilize` a value is a method, several joined by +, or none
  --seeds N | A,B,C         how many seeds (3), or which; all variants see the same data in the same order
  --a.b=value               changes that all runs share: --max_steps 500, --data.path PATH, ...
  --output_dir DIR          where the run folders and the results go (runs/compare-RECIPE)
  --jobs N                  runs at a time; default: one a GPU, or one a core with one thread each
  --metric KEY              what is compared (eval/loss)
  --usable SHARE            a rate is usable if its mean loss misses at most this share of what training gains, loss before
                            training minus the variant's best (0.1)
  --retry_failed            run the cells again that failed

The same command again goes on: finished runs are read, interrupted ones resumed; values and seeds may be added.
Results: DIR/compare.html, DIR/compare.json, DIR/compare.csv, and each run in a folder of its own.

examples:
  tame compare vit-digits --vary stabilize=none,sigma_reparam
  tame compare vit-digits --vary optim.peak_lr=3e-4,1e-3,3e-3,1e-2,3e-2 --vary stabilize=none,sigma_reparam --seeds 5
  tame compare char-lm --data.path shakespeare.txt --max_steps 500 --vary model.positions=learned,rotary --metric eval/loss

Exit codes: 0 all runs ended, diverged ones among them or not; 1 some failed; 2 usage; 130 and 143 stopped.
"""


def main(arguments: Sequence[str]) -> int:
    """Run what is left of the grid, print and write the results; returns the exit code."""
    given = list(arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0].startswith("-"):
        return _fail("the recipe comes first: tame compare RECIPE --vary ...", 2)
    parser = _parser()
    try:
        own, rest = parser.parse_known_args(given[1:])
    except SystemExit:
        return 2
    if "--help" in rest or "-h" in rest:
        print(USAGE, end="")
        return 0

    # From here on torch is needed; the usage above is shown without it.
    from tameformer.errors import ConfigError, TameError
    from tameformer.studies.compare import conclude, default_folder, run_grid
    from tameformer.studies.grid import make_grid, parse_seeds, parse_vary
    from tameformer.training.signals import StopRequest

    console = Console(stderr=True)
    _log_to(console)
    try:
        grid = make_grid(given[0], rest, parse_vary(own.vary), parse_seeds(own.seeds))
        folder = own.output_dir or default_folder(given[0])
        with StopRequest() as stop, _Progress(console, folder, grid) as progress:
            run_grid(
                grid, folder, jobs=own.jobs, retry_failed=own.retry_failed, stop=stop, on_change=progress.show
            )  # fmt: skip
        results = conclude(folder, grid, metric=own.metric, usable=own.usable)
    except KeyboardInterrupt:  # before the first run was started
        return 130
    except ConfigError as error:
        return _fail(error, 2)
    except (TameError, ValueError, OSError, ImportError) as error:
        return _fail(error, 1)
    _print_results(results)
    if stop.signal_number is not None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    return 0 if results.counts().get("failed", 0) + results.counts().get("interrupted", 0) == 0 else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tame compare", add_help=False, allow_abbrev=False)
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--metric", default="eval/loss")
    parser.add_argument("--usable", type=float, default=0.1)
    parser.add_argument("--retry_failed", action="store_true")
    return parser


class _Progress:
    """What runs: a live table in a terminal, a line when a run ends elsewhere."""

    def __init__(self, console: Console, folder: Path, grid) -> None:
        from tameformer.studies.cells import state_of

        self.console, self.folder, self.cells = console, folder, grid.cells
        self._state_of = state_of
        self._max_steps: int | None = None
        self._shown = 0.0
        self._told = ""
        self._started = time.monotonic()
        self._done_before: int | None = None
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None

    def __enter__(self) -> "_Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, running) -> None:
        if time.monotonic() - self._shown < 0.5:
            return
        self._shown = time.monotonic()
        states = [self._state_of(self.folder / cell.name)[0] for cell in self.cells]
        busy = {run.cell.name for run in running}
        counts = {state: states.count(state) for state in ("finished", "diverged", "failed")}
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "finished")
        line = f"{sum(counts.values())} of {len(self.cells)} runs: {told}, {len(busy)} running"
        if self._live is None:
            if told != self._told:
                self._told = told
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            return
        from tameformer.studies.cells import position

        table = Table(box=None, show_header=False, pad_edge=False)
        for run in running:
            step, loss = position(run.folder)
            table.add_row(Text(run.cell.name), f"step {step}", "" if loss is None else f"loss {loss:.4g}")
        self._live.update(Group(Text(line), table))


def _print_results(results) -> None:
    from tameformer.report.wording import number, quantity

    console = Console(width=None if sys.stdout.isatty() else 120)

    def with_interval(key: str, found) -> str:
        if found is None:
            return "\u2013"
        half = "" if found.half_width is None else f" \u00b1 {quantity(key, found.half_width)}"
        return f"{quantity(key, found.mean)}{half}"

    table = Table(title=Text(f"{results.grid.recipe}: {results.metric}, mean \u00b1 95 % interval over seeds"),
                  title_justify="left")  # fmt: skip
    for factor in results.grid.factors:
        table.add_column(factor.name)
    table.add_column(results.metric, justify="right")
    table.add_column("n", justify="right")
    table.add_column("diverged", justify="right")
    table.add_column("failed", justify="right")
    for row in results.rows:
        table.add_row(
            *(Text(choice.label) for choice in row.choices),
            with_interval(results.metric, row.metric(results.metric)),
            f"{row.count('finished')}/{len(row.results)}",
            *(str(row.count(state) or "") for state in ("diverged", "failed")),
        )
    console.print(table)
    if results.grid.rates is not None:
        table = Table(title=Text(f"learning rates ({results.loss}, usable within {results.tolerance:.0%} of the gain)"),
                      title_justify="left")  # fmt: skip
        for heading in ("variant", "sensitivity", "n", "usable rates", "highest, to the first", "width, to the first"):
            table.add_column(heading)
        for variant in results.variants:
            ratio, width = variant.highest_to(results.variants[0]), variant.width_to(results.variants[0])
            found = variant.sensitivity
            table.add_row(
                Text(variant.name),
                with_interval(results.loss, found),
                "0" if found is None else str(found.n),
                "none" if variant.usable is None else " to ".join(map(number, variant.usable)),
                "" if ratio is None else f"{number(ratio)} x",
                "" if width is None else f"{number(width)} x",
            )
        console.print(table)


def _log_to(console: Console) -> None:
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.getLogger("tameformer").addHandler(handler)
    logging.getLogger("tameformer").setLevel(logging.INFO)


def _fail(error: object, code: int) -> int:
    print(f"tame compare: {error}", file=sys.stderr)
    return code
