"""`tame race RECIPE --budget 20`: many seeds started, judged early, a few trained to the end."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

USAGE = """\
usage: tame race RECIPE --budget RUNS [--vary KEY=VALUE,VALUE] [--a.b=value ...]

Starts many runs of RECIPE that differ in the seed of their weights and in that of the order of their data, stops all early,
and continues the best ones to the end (Dodge et al. 2020): the best model that a budget affords, and how much was luck.

  --budget RUNS             what may be spent, in whole runs: t f + p (1 - f) for t starts to the share f, p of them continued
  --share F                 share of each run after which all are judged (0.3)
  --starts T, --continue P  how many start, and how many go on; without them, P near half the budget, and as many starts as
                            that affords: 20 runs are 41 starts to 0.3, and 11 to the end
  --vary KEY=VALUE,VALUE    values that take part, too, each with the same seeds
  --run_all                 continue all, beyond the budget: shows whether early rank predicts final rank, and what stopping
                            would have missed
  --metric KEY              what they are judged by; default: the recipe's checkpoint.best_metric, or eval/loss
  --failed VALUE            a run that is no better has failed; default: what each had before training
  --a.b=value               changes that all runs share: --data.path PATH, --init_from RUN, ...
  --output_dir DIR          where the run folders and the results go (runs/race-RECIPE)
  --jobs N                  runs at a time; default: one a GPU, or one a core with one thread each
  --storage URL             shares the work with every machine that runs the same command on a disk they share, through a
                            database: sqlite:////shared/study.db, postgresql://user@host/study (needs the extra sweep)
  --retry_failed            run those again that failed

The same command again goes on, with a larger budget, too. A run that is continued is the one that was stopped, to the bit.
Results: DIR/race.html, DIR/race.json, DIR/race.csv, and each run in a folder of its own.

examples:
  tame race vit-digits --budget 4
  tame race text-classification --data.path rte.jsonl --init_from runs/masked-lm --budget 20 --failed 0.53
  tame race text-classification --data.path rte.jsonl --init_from bert --budget 20 --vary finetune.mixout=null,0.5 --run_all

Exit codes: 0 the race is over, diverged runs among it or not; 1 some failed; 2 usage; 130 and 143 stopped.
"""


def main(arguments: Sequence[str]) -> int:
    """Run what is left of the race, print and write the results; returns the exit code."""
    given = list(arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if given else 2
    if given[0].startswith("-"):
        return _fail("the recipe comes first: tame race RECIPE --budget 20 ...", 2)
    try:
        own, rest = _parser().parse_known_args(given[1:])
    except SystemExit:
        return 2
    if "--help" in rest or "-h" in rest:
        print(USAGE, end="")
        return 0
    if own.budget is None:
        return _fail("--budget is missing: what may be spent, in whole runs, such as --budget 20", 2)

    # From here on torch is needed; the usage above is shown without it.
    from rich.console import Console

    from tameformer.cli.compare import log_to, silence_optuna
    from tameformer.cli.compare_view import GridProgress, as_rich
    from tameformer.errors import ConfigError, TameError
    from tameformer.studies.cells import State
    from tameformer.studies.grid import Cell, parse_vary
    from tameformer.studies.race import PAGE, conclude, default_folder, make_race, run_race
    from tameformer.studies.race_page import summary_tables
    from tameformer.studies.workers import Running
    from tameformer.training.signals import StopRequest

    console = Console(stderr=True)
    log_to(console)
    if own.storage is not None:
        silence_optuna()
    folder = own.output_dir or default_folder(given[0])

    def show(shown: ExitStack) -> Callable[..., Callable[[Sequence[Running]], None]]:
        def on_stage(name: str, cells: Sequence[Cell], ends: Sequence[State]) -> Callable[[Sequence[Running]], None]:
            shown.close()  # the live display of the stage before
            console.print(f"{name}: {len(cells)} runs", highlight=False, soft_wrap=True)
            return shown.enter_context(GridProgress(console, folder, cells, ends=ends)).show

        return on_stage

    try:
        planned = make_race(
            given[0], rest, parse_vary(own.vary), budget=own.budget, share=own.share, starts=own.starts,
            continued=own.continued, metric=own.metric, failed=own.failed, run_all=own.run_all,
        )  # fmt: skip
        plan = planned.plan
        console.print(
            f"{plan.starts} starts to {plan.share:g} of the run, {plan.continued} to its end: {plan.cost:g} whole runs"
            + (", and the rest to see what stopping misses" if own.run_all else ""),
            highlight=False,
            soft_wrap=True,
        )
        with StopRequest() as stop, ExitStack() as shown:
            run_race(
                planned, folder, jobs=own.jobs, retry_failed=own.retry_failed, storage=own.storage, stop=stop,
                on_stage=show(shown),
            )  # fmt: skip
        results = conclude(planned, folder)
    except KeyboardInterrupt:  # before the first run was started
        return 130
    except ConfigError as error:
        return _fail(error, 2)
    except (TameError, ValueError, OSError, ImportError) as error:
        return _fail(error, 1)
    out = Console(width=None if sys.stdout.isatty() else 120)
    for table in summary_tables(results):
        if table.rows:
            out.print(as_rich(replace(table, rows=table.rows[:20])))
    if results.best is not None:
        out.print(f"best model: {folder / results.best.name}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"page: {folder / PAGE}", highlight=False, markup=False, soft_wrap=True)
    if stop.signal_number is not None:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return stop.exit_code
    return 0 if results.is_over and not results.counts().get("failed", 0) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tame race", add_help=False, allow_abbrev=False)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--starts", type=int)
    parser.add_argument("--continue", type=int, dest="continued")
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--run_all", action="store_true")
    parser.add_argument("--metric")
    parser.add_argument("--failed", type=float)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--storage")
    parser.add_argument("--retry_failed", action="store_true")
    return parser


def _fail(error: object, code: int) -> int:
    print(f"tame race: {error}", file=sys.stderr)
    return code
