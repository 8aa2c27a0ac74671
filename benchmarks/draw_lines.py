"""Draws the same figure of several runs into one picture: what their reports show apart, such as BLEU by sentence length.

Example:
    python benchmarks/draw_lines.py bleu-by-length attention=runs/additive "one vector=runs/none" --output docs/bleu.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tameformer.record import RunReader
from tameformer.report.drawing import MUTED, PALETTE

STYLES = ("-", "--", ":", "-.")


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("figure", help="its name in the folder `figures` of a run")
    options.add_argument("runs", nargs="+", help="LABEL=FOLDER")
    options.add_argument("--output", type=Path, required=True, help="the picture")
    options.add_argument("--title", help="in place of the figure's own")
    given = options.parse_args(arguments)
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        shown = {}
        for color, run in zip(PALETTE, given.runs, strict=False):
            label, _, folder = run.partition("=")
            shown = RunReader(Path(folder)).figures()[given.figure]
            for style, values in zip(STYLES, shown["lines"].values(), strict=False):
                ys = [float("nan") if value is None else value for value in values]
                axes.plot(shown["x"], ys, style, marker="o", markersize=4, color=color, label=label)
                label = None  # the further lines of a run have its colour
        axes.set(xlabel=shown["x_label"], title=given.title or shown["title"], ylim=(0, None))
        axes.tick_params(colors=MUTED)
        axes.title.set_fontsize(10)
        axes.legend(frameon=False)
        figure.savefig(given.output, dpi=130)


if __name__ == "__main__":
    main()
