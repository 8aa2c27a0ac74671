"""`tame train [RECIPE] [--a.b=value ...]`."""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from tameformer.cli.imports import uncollected

USAGE = """\
usage: tame train [RECIPE] [--a.b=value ...]

RECIPE is a name that `tame recipes` lists, a YAML file, or a run folder; without one, vit-digits is trained.

options of every recipe:
  --print_config            print the whole configuration as YAML and exit
  --dry_run                 build everything, run one step and one evaluation, keep nothing
  --resume auto|never|PATH  continue the run folder where it stands (or start it); never is the default;
                            PATH is a run folder or one of its checkpoints
  --inject FAULT,FAULT,...  rehearse: nan@120, inf-grad@50, spike@200x1000, bad-batch@300, kill@400, term@500, hang@600,
                            oom@700; numbers are batches, nan@120-128 is a range, kill@save and kill@eval the first of
                            those; enospc@save, eio@save, corrupt@latest are about checkpoints
  --overfit_batches N       train on the first N batches only, over and over
  --output_dir DIR          the run folder
  --max_steps N, --seed N, --data_seed N, --checkpoint.every N, --data.path PATH, ...

examples:
  tame train
  tame train vit-digits --seed 1 --optim.peak_lr=1e-3
  tame train char-lm --data.path shakespeare.txt --output_dir runs/bard --resume auto
  torchrun --nproc_per_node 2 -m tameformer.cli train char-lm --data.path shakespeare.txt

`tame train RECIPE --help` lists every key of a recipe with its meaning.
"""
_OWN = ("print_config", "dry_run", "resume", "inject")


def main(arguments: Sequence[str]) -> int:
    """Train; returns the exit code."""
    given = list(arguments)
    if given and given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    name = given.pop(0) if given and not given[0].startswith("-") else None

    # From here on torch is needed; the usage above is shown without it.
    from tameformer.errors import ConfigError, DivergedError, NonFiniteError, TameError
    from tameformer.recipes import catalogue

    try:
        own, rest = _own_options(given)
        with uncollected():
            recipe = catalogue.parse(name or catalogue.DEFAULT, rest, also=_OWN)
            if own.print_config:
                print(recipe.to_yaml(), end="")
                return 0
            import tameformer.recipes.launch  # noqa: F401 -- here, with all else that is imported
        return _dry_run(recipe) if own.dry_run else _train(recipe, own.resume, own.inject)
    except KeyboardInterrupt:  # before the loop took over: nothing has been trained yet
        return 130
    except ConfigError as error:
        return _fail(error, 2)
    except (DivergedError, NonFiniteError) as error:
        return _fail(error, 3)
    except (TameError, ValueError, OSError, ImportError) as error:
        return _fail(error, 1)


def _own_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--dry_run", action="store_true")
    parser.add_argument("--resume", default="never")
    parser.add_argument("--inject", default="")
    return parser.parse_known_args(arguments)


def _train(recipe, resume: str, inject: str) -> int:
    import torch

    from tameformer.cli.progress import Progress
    from tameformer.recipes.launch import launch
    from tameformer.training.engine import leave
    from tameformer.training.watchdog import EXIT_CODE

    console = Console(stderr=True)
    _log_to(console)
    progress = Progress(console)
    result = launch(recipe, resume=resume, listeners=[progress], inject=inject, on_hang=partial(os._exit, EXIT_CODE))
    if int(os.environ.get("RANK", "0")) == 0:
        progress.conclude(result.folder, result.metrics, finished=result.finished)
    if torch.distributed.is_initialized():
        leave(result.exit_code)
    return result.exit_code


def _dry_run(recipe) -> int:
    """One step and one evaluation of the recipe in a folder that is removed afterwards."""
    from tameformer.recipes.catalogue import with_values
    from tameformer.recipes.launch import launch

    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        optim = replace(recipe.config.optim, warmup_steps=0)  # one step is shorter than any warm-up
        result = launch(with_values(recipe, output_dir=str(Path(folder) / "run"), max_steps=1, optim=optim))
    loss = result.metrics.get("train/loss")
    console.print(
        f"dry run: one step and one evaluation of {recipe.name} ran (train/loss {loss:.4g}); nothing was kept"
    )
    return 0


def _log_to(console: Console) -> None:
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_level=False, show_path=False)
    logging.getLogger("tameformer").addHandler(handler)
    logging.getLogger("tameformer").setLevel(logging.INFO)


def _fail(error: Exception, code: int) -> int:
    print(f"tame train: {error}", file=sys.stderr)
    return code
