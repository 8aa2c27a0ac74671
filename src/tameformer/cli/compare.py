"""`tame compare RECIPE --vary a.b=1,2 [--seeds 3]`: runs side by side."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

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
  --storage URL             shares the work with every machine that runs the same command on a disk they share, through a
                            database: sqlite:////shared/study.db, postgresql://user@host/study (needs the extra sweep)
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
    from tameformer.cli.compare_view import GridProgress, print_results
    from tameformer.errors import ConfigError, TameError
    from tameformer.studies.compare import PAGE, check_question, conclude, default_folder, queue_for, run_grid
    from tameformer.studies.grid import make_grid, parse_seeds, parse_vary
    from tameformer.training.signals import StopRequest

    console = Console(stderr=True)
    log_to(console)
    if own.storage is not None:
        silence_optuna()
    try:
        check_question(own.metric, own.usable)
        grid = make_grid(given[0], rest, parse_vary(own.vary), parse_seeds(own.seeds))
        folder = own.output_dir or default_folder(given[0])
        with StopRequest() as stop, GridProgress(console, folder, grid.cells) as progress:
            run_grid(
                grid,
                folder,
                jobs=own.jobs,
                retry_failed=own.retry_failed,
                queue=queue_for(own.storage),
                stop=stop,
                on_change=progress.show,
            )
        results = conclude(folder, grid, metric=own.metric, usable=own.usable)
    except KeyboardInterrupt:  # before the first run was started
        return 130
    except ConfigError as error:
        return _fail(error, 2)
    except (TameError, ValueError, OSError, ImportError) as error:
        return _fail(error, 1)
    print_results(results, folder / PAGE)
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
    parser.add_argument("--storage")
    parser.add_argument("--retry_failed", action="store_true")
    return parser


def log_to(console: Console) -> None:
    """A line each message, however narrow the terminal, above the live display."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)

    logging.getLogger("tameformer").addHandler(Handler())
    logging.getLogger("tameformer").setLevel(logging.INFO)


def silence_optuna() -> None:
    """No line of Optuna's own for each run."""
    try:
        import optuna
    except ImportError:
        return  # which is told, with the extra's name, where it is needed
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def _fail(error: object, code: int) -> int:
    print(f"tame compare: {error}", file=sys.stderr)
    return code
