"""What the commands that run a whole study share: how they are called, what they tell, how they end."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from tameformer.errors import ConfigError, TameError

STUDY_ERRORS = (KeyboardInterrupt, TameError, ValueError, OSError, ImportError)
"""What ends a study with a sentence and an exit code; anything else is a mistake of ours, and shows where."""


class Call(NamedTuple):
    """What a command was called with."""

    recipe: str
    own: argparse.Namespace
    """The command's own options."""
    rest: list[str]
    """Those of the recipe."""


def study_parser(command: str) -> argparse.ArgumentParser:
    """The options that all these commands have."""
    parser = argparse.ArgumentParser(prog=f"tame {command}", add_help=False, allow_abbrev=False)
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--metric")
    parser.add_argument("--storage")
    parser.add_argument("--retry_failed", action="store_true")
    return parser


def parse_call(arguments: Sequence[str], parser: argparse.ArgumentParser, *, usage: str, example: str) -> Call | int:
    """The call, or the exit code where there is nothing to run."""
    given = list(arguments)
    if not given or given[0] in ("-h", "--help"):
        print(usage, end="")
        return 0 if given else 2
    if given[0].startswith("-"):
        return fail(parser.prog, f"the recipe comes first: {example}", 2)
    try:
        own, rest = parser.parse_known_args(given[1:])
    except SystemExit:
        return 2
    if "--help" in rest or "-h" in rest:
        print(usage, end="")
        return 0
    return Call(given[0], own, rest)


def open_console(storage: str | None) -> Console:
    """Where the study tells how it goes: a line each message, however narrow the terminal, above the live display."""
    console = Console(stderr=True)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)

    logging.getLogger("tameformer").addHandler(Handler())
    logging.getLogger("tameformer").setLevel(logging.INFO)
    if storage is not None:
        _silence_optuna()
    return console


def _silence_optuna() -> None:
    """No line of Optuna's own for each run."""
    try:
        import optuna
    except ImportError:
        return  # which is told, with the extra's name, where it is needed
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def failed(command: str, error: BaseException) -> int:
    """The exit code of one of `STUDY_ERRORS`, which is told."""
    if isinstance(error, KeyboardInterrupt):  # before the first run was started
        return 130
    return fail(command, error, 2 if isinstance(error, ConfigError) else 1)


def fail(command: str, error: object, code: int) -> int:
    """Say what went wrong; returns the exit code."""
    print(f"{command}: {error}", file=sys.stderr)
    return code


def say_stopped() -> None:
    """A signal ended the study after its runs were saved."""
    print("stopped; the same command goes on from here", file=sys.stderr)
