"""Draws what a comparison over learning rates found: the metric by rate and method, and the attention entropy at the last rate.

Example:
    python benchmarks/draw_rates.py runs/rates --output docs/rates.png
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tameformer.record import RunReader
from tameformer.report.drawing import MUTED, PALETTE

Points = Mapping[tuple[str, float], Sequence[tuple[Path, float]]]
ENTROPY = "train/attention_entropy"


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("comparison", type=Path, nargs="+", help="folders that `tame compare` wrote")
    options.add_argument("--output", type=Path, required=True, help="the picture")
    options.add_argument("--metric", default="eval/loss")
    given = options.parse_args(arguments)
    found = points(given.comparison, given.metric)
    methods, rates = list(dict.fromkeys(method for method, _ in found)), sorted({rate for _, rate in found})
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for color, method in zip(PALETTE, methods, strict=False):
            values = [(rate, [value for _, value in found.get((method, rate), ())]) for rate in rates]
            by_rate(left, [(rate, of_rate) for rate, of_rate in values if of_rate], method, color)
            for run, _ in found.get((method, rates[-1]), ()):
                by_step(right, run, color)
        left.set_xscale("log")
        left.set_xticks(rates, [f"{rate:g}" for rate in rates])
        left.minorticks_off()
        left.set(xlabel="peak learning rate", title=f"{given.metric}, each seed and their mean")
        left.legend(frameon=False)
        right.set(xlabel="step", ylim=(0, None), title=f"mean attention entropy at {rates[-1]:g}, nats, each seed")
        for axes in (left, right):
            axes.tick_params(colors=MUTED)
            axes.title.set_fontsize(10)
        figure.savefig(given.output, dpi=130)


def points(folders: Sequence[Path], metric: str) -> Points:
    """Run folder and metric of each finished run, by method and rate."""
    found: dict[tuple[str, float], list[tuple[Path, float]]] = defaultdict(list)
    for folder in folders:
        with open(folder / "compare.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if row["state"] == "finished":
                    run = (folder / row["folder"], float(row[metric]))
                    found[row["stabilize"], float(row["optim.peak_lr"])].append(run)
    return found


def by_rate(axes: Axes, values: Sequence[tuple[float, Sequence[float]]], name: str, color: str) -> None:
    """A line through the means, and a point for each seed."""
    axes.plot(
        [rate for rate, _ in values], [statistics.fmean(of_rate) for _, of_rate in values], color=color, label=name
    )
    seeds = [(rate, value) for rate, of_rate in values for value in of_rate]
    axes.plot(*zip(*seeds, strict=True), "o", color=color, markersize=4, alpha=0.6)


def by_step(axes: Axes, run: Path, color: str) -> None:
    """The course of the mean entropy."""
    lines = [line for line in RunReader(run).log() if ENTROPY in line]
    axes.plot([line["step"] for line in lines], np.array([line[ENTROPY] for line in lines]), color=color, linewidth=1)


if __name__ == "__main__":
    main()
