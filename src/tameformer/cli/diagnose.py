"""`tame diagnose MODEL_OR_RUN`: one batch through a model, measured layer by layer and head by head, with verdicts."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tameformer.errors import TameError

_EPILOG = """\
examples:
  tame diagnose runs/char-lm                                 the newest checkpoint, on the run's next batch
  tame diagnose runs/char-lm/checkpoints/step-000500         one of its checkpoints
  tame diagnose path/to/bert --text notes.txt                a Hugging Face folder, on your text
  tame diagnose runs/char-lm --json health.json --html health.html

Exit codes: 0 measured, whatever was found; 1 error; 2 usage.
"""


def main(arguments: Sequence[str]) -> int:
    """Print the diagnosis and write the files asked for; returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        for file in (options.json, options.html):
            if file is not None and not file.absolute().parent.is_dir():
                parser.error(f"{file}: there is no folder {file.parent}; create it, or name another")
        if not options.model.exists():
            parser.error(f"{options.model} does not exist; give a run folder, a checkpoint or a Hugging Face folder")
    except SystemExit as stop:
        return int(stop.code or 0)
    from rich.console import Console

    try:
        diagnosis, title = _diagnose(options.model, options.text)
        if options.json is not None:
            options.json.write_text(diagnosis.to_json() + "\n", encoding="utf-8")
        if options.html is not None:
            options.html.write_text(diagnosis.to_html(title=title), encoding="utf-8")
    except (TameError, OSError, ImportError) as error:
        print(f"tame diagnose: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(title, style="bold", highlight=False, markup=False)
    diagnosis.print(console, rows=options.rows)
    return 0


def _diagnose(path: Path, text: Path | None):  # a pair of Diagnosis and title; torch is imported from here on
    from tameformer.integrations.pretrained import examine_pretrained, is_pretrained
    from tameformer.recipes.examine import examine

    if is_pretrained(path):
        diagnosis, what = examine_pretrained(path, text)
        return diagnosis, f"{path.resolve().name}, on {what}"
    diagnosis, step = examine(path)
    return diagnosis, f"{path}, checkpoint of step {step}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tame diagnose",
        description="Run one batch through a model and say how healthy it is, layer by layer and head by head.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL_OR_RUN", help="run folder, checkpoint, or folder written by save_pretrained"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="text to measure on, for a folder with a tokenizer; default: random tokens",
    )
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="rows of each table to print (8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page")
    return parser
