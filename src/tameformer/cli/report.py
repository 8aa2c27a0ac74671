"""`tame report RUN [RUN ...]`: one self-contained HTML page about a run, or about several side by side."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tameformer.errors import TameError

_EPILOG = """\
examples:
  tame report runs/vit-digits                          writes runs/vit-digits/report.html
  tame report runs/a runs/b --out comparison.html      overlays the curves, sets the results side by side
"""


def main(arguments: Sequence[str]) -> int:
    """Write the page and print its path; 0 when written, 1 when a folder holds no run, 2 for wrong usage."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
        if options.out is not None and not options.out.absolute().parent.is_dir():
            parser.error(f"--out {options.out}: there is no folder {options.out.parent}; create it, or name another")
    except SystemExit as stop:
        return int(stop.code or 0)
    from tameformer.report import write_comparison, write_report

    try:
        alone = len(options.runs) == 1
        path = write_report(options.runs[0], options.out) if alone else write_comparison(options.runs, options.out)
    except (TameError, OSError) as error:
        print(f"tame report: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tame report",
        description="Write one self-contained HTML page about a run, finished or not, or about several side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder, such as runs/vit-digits")
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="the page to write; default: report.html in the run folder, comparison.html here for several runs",
    )  # fmt: skip
    return parser
