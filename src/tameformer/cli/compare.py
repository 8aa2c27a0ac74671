"""`tame compare RECIPE --vary a.b=1,2 [--seeds 3]`: runs side by side."""

import argparse
from collections.abc import Sequence

from tameformer.cli.study import STUDY_ERRORS, failed, open_console, parse_call, say_stopped, study_parser

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
    parser = _parser()
    call = parse_call(arguments, parser, usage=USAGE, example="tame compare RECIPE --vary ...")
    if isinstance(call, int):
        return call
    recipe, own, rest = call

    # From here on torch is needed; the usage above is shown without it.
    from tameformer.cli.compare_view import GridProgress, print_results
    from tameformer.studies.compare import PAGE, check_question, conclude, default_folder, queue_for, run_grid
    from tameformer.studies.grid import make_grid, parse_seeds, parse_vary
    from tameformer.training.signals import StopRequest

    console = open_console(own.storage)
    try:
        check_question(own.metric, own.usable)
        grid = make_grid(recipe, rest, parse_vary(own.vary), parse_seeds(own.seeds))
        folder = own.output_dir or default_folder(recipe)
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
    except STUDY_ERRORS as error:
        return failed(parser.prog, error)
    print_results(results, folder / PAGE)
    if stop.signal_number is not None:
        say_stopped()
        return stop.exit_code
    return 0 if results.counts().get("failed", 0) + results.counts().get("interrupted", 0) == 0 else 1


def _parser() -> argparse.ArgumentParser:
    parser = study_parser("compare")
    parser.set_defaults(metric="eval/loss")
    parser.add_argument("--seeds", default="3")
    parser.add_argument("--usable", type=float, default=0.1)
    return parser
