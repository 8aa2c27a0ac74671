"""`tame race RECIPE --budget 20`: many seeds started, judged early, a few trained to the end."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack

from tameformer.cli.study import STUDY_ERRORS, fail, failed, open_console, parse_call, say_stopped, study_parser

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
    parser = _parser()
    call = parse_call(arguments, parser, usage=USAGE, example="tame race RECIPE --budget 20 ...")
    if isinstance(call, int):
        return call
    recipe, own, rest = call
    if own.budget is None:
        return fail(parser.prog, "--budget is missing: what may be spent, in whole runs, such as --budget 20", 2)

    # From here on torch is needed; the usage above is shown without it.
    from tameformer.cli.race_view import print_plan, print_results, stage_display
    from tameformer.studies.grid import parse_vary
    from tameformer.studies.race import conclude, default_folder, make_race, run_race
    from tameformer.training.signals import StopRequest

    console = open_console(own.storage)
    folder = own.output_dir or default_folder(recipe)
    try:
        planned = make_race(
            recipe, rest, parse_vary(own.vary), budget=own.budget, share=own.share, starts=own.starts,
            continued=own.continued, metric=own.metric, failed=own.failed, run_all=own.run_all,
        )  # fmt: skip
        print_plan(console, planned.plan, run_all=own.run_all)
        with StopRequest() as stop, ExitStack() as shown:
            run_race(
                planned, folder, jobs=own.jobs, retry_failed=own.retry_failed, storage=own.storage, stop=stop,
                on_stage=stage_display(console, folder, shown),
            )  # fmt: skip
        results = conclude(planned, folder)
    except STUDY_ERRORS as error:
        return failed(parser.prog, error)
    print_results(results, folder)
    if stop.signal_number is not None:
        say_stopped()
        return stop.exit_code
    return 0 if results.is_over and not results.counts().get("failed", 0) else 1


def _parser() -> argparse.ArgumentParser:
    parser = study_parser("race")
    parser.add_argument("--budget", type=float)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--starts", type=int)
    parser.add_argument("--continue", type=int, dest="continued")
    parser.add_argument("--run_all", action="store_true")
    parser.add_argument("--failed", type=float)
    return parser
