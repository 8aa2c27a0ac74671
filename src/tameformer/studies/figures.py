"""The figures of a comparison: the metric against the learning rate, learning curves, paired differences."""

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tameformer.report.axes import value_ticks, wants_log
from tameformer.report.curves import Line, line_chart
from tameformer.report.drawing import BROKEN, INK, MUTED, PALETTE, WIDE, Chart, drawing
from tameformer.report.loss import smoothed
from tameformer.report.read import Series, clean
from tameformer.report.wording import is_share, label, number, shorten
from tameformer.studies.results import Results, Row, Variant
from tameformer.studies.tables import named, where

_MARKERS = "osD^vPX"
SPREAD = (
    0.012  # of the rate axis, between the points of neighbouring variants, so that their bars do not hide each other
)


def look(index: int) -> tuple[str, str]:
    """Colour and marker of a variant; beyond the palette the colours come again with other markers."""
    lap, place = divmod(index, len(PALETTE))
    return PALETTE[place], _MARKERS[(place + lap) % len(_MARKERS)]


def rate_chart(results: Results) -> Chart:
    """The metric against the learning rate, a line each variant, with intervals and the runs that diverged."""
    rates = np.array(results.variants[0].rates)
    percent = is_share(results.metric)
    initial = _mean_initial(results) if results.metric == results.loss else None
    title = f"{label(results.metric)} against learning rate"
    width, height = WIDE, 340
    legend: list[tuple[str, str, str]] = []
    with drawing(width, height) as (figure, save):
        axes = figure.add_axes((62 / width, 44 / height, (width - 76) / width, (height - 74) / height))
        axes.set_xscale("log")
        span = math.log(rates[-1] / rates[0]) if len(rates) > 1 else 1.0
        shown: list[float] = []
        crossed = 0
        for index, variant in enumerate(results.variants):
            color, marker = look(index)
            shift = (index - (len(results.variants) - 1) / 2) * SPREAD * span
            places = rates * math.exp(shift)
            found = [row.metric(results.metric) for row in variant.rows]
            known = [(place, one) for place, one in zip(places, found, strict=True) if one is not None]
            axes.errorbar(
                [place for place, _ in known], [one.mean for _, one in known],
                yerr=[one.half_width or 0.0 for _, one in known],
                color=color, marker=marker, markersize=5.5, capsize=3, elinewidth=1.1, linewidth=1.5,
            )  # fmt: skip
            shown += [one.mean for _, one in known]
            crossed += _mark_diverged(axes, variant.rows, places, color)
            legend.append((clean(variant.name), color, "line"))
        log = wants_log(np.array(shown)) and not percent
        if initial is not None:
            axes.axhline(initial, color=MUTED, linestyle=":", linewidth=1.2, zorder=1)
            legend.append(("before training", MUTED, "dotted"))
            shown.append(initial)
        _limit(axes, results, np.array(shown), initial, log=log)
        value_ticks(axes, np.array(shown or [0.0]), log=log, percent=percent)
        axes.xaxis.set_major_locator(FixedLocator(rates.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(float(value))))
        axes.set_xlim(rates[0] * math.exp(-0.06 * span), rates[-1] * math.exp(0.06 * span))
        axes.set_xlabel("peak learning rate")
        axes.grid(axis="y")
        svg = save(title)
    if crossed:
        legend.append((f"{crossed} of {len(results.cells)} runs diverged", BROKEN, "cross"))
    caption = "Mean of the runs that finished, with 95 % interval over seeds. Logarithmic rates" + ", and losses." * log
    return Chart(title, svg, caption.rstrip(".") + ".", wide=True, legend=tuple(legend))


def _mark_diverged(axes: Axes, rows: Sequence[Row], places: np.ndarray, color: str) -> int:
    """A cross in the variant's colour at the top edge where runs diverged, with how many if more than one."""
    total = 0
    for row, place in zip(rows, places, strict=True):
        count = row.count("diverged")
        total += count
        if count:
            axes.plot(place, 1.03, "x", color=color, markersize=7, markeredgewidth=2, clip_on=False,
                      transform=axes.get_xaxis_transform())  # fmt: skip
        if count > 1:
            axes.annotate(str(count), (place, 1.03), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                          xytext=(0, 6), ha="center", va="bottom", fontsize=9, color=color)  # fmt: skip
    return total


def _limit(axes: Axes, results: Results, shown: np.ndarray, initial: float | None, *, log: bool) -> None:
    """Keep the axis to what can be told apart: an interval of two seeds may be ten times as wide as all means are apart."""
    if log:
        axes.set_yscale("log")
    if not len(shown):
        return
    top, bottom = float(shown.max()), float(shown.min())
    if initial is not None and top > 1.5 * initial and not log:
        top = 1.5 * initial
    room = (top - bottom) or abs(top) or 1.0
    low, high = axes.get_ylim()
    if not log:
        axes.set_ylim(max(low, bottom - 0.35 * room), min(high, top + 0.35 * room))


def _mean_initial(results: Results) -> float | None:
    found = [value for result in results.cells if (value := result.initial(results.loss)) is not None]
    return math.fsum(found) / len(found) if found else None


def dot_chart(results: Results) -> Chart:
    """The metric of each variant with its interval, one below the other; for comparisons without a rate."""
    rows = [(named(results, row), row.metric(results.metric), row.count("diverged")) for row in results.rows]
    title = label(results.metric)
    points = [
        (name + (f" ({diverged} diverged)" if diverged else ""), found, PALETTE[0]) for name, found, diverged in rows
    ]
    return _interval_chart(title, points, percent=is_share(results.metric), zero=False)


def difference_chart(results: Results) -> Chart:
    """Every variant minus the first, with the interval over the seeds."""
    colors = {variant.name: look(index)[0] for index, variant in enumerate(results.variants)}
    points = [
        (f"{clean(one.variant)}{f', {where(one)}' if where(one) else ''}", one.difference, colors[one.variant])
        for one in results.differences
    ]
    title = f"{label(results.metric)}: difference to {clean(results.variants[0].name)}"
    return _interval_chart(title, points, percent=is_share(results.metric), zero=True)


def _interval_chart(title: str, points: Sequence, *, percent: bool, zero: bool) -> Chart:
    known = [point for point in points if point[1] is not None]
    height = 64 + 24 * len(known)
    left = 24 + min(300, int(6.2 * max((len(shorten(name, 46)) for name, _, _ in known), default=1)))
    with drawing(WIDE, height) as (figure, save):
        axes = figure.add_axes((left / WIDE, 42 / height, (WIDE - left - 24) / WIDE, (height - 52) / height))
        for index, (_, found, color) in enumerate(known):
            axes.errorbar(found.mean, index, xerr=found.half_width or 0.0, fmt="o", color=color, markersize=5.5,
                          capsize=3, elinewidth=1.4)  # fmt: skip
        if zero:
            axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
        axes.set_yticks(range(len(known)), [shorten(name, 46) for name, _, _ in known])
        axes.set_ylim(len(known) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        if percent:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        svg = save(title)
    return Chart(title, svg, "Mean over seeds with 95 % interval; a dot alone is one seed.", wide=True)


def curve_charts(results: Results, logs: Mapping[str, Mapping[str, Series]]) -> list[Chart]:
    """Learning curves: each variant at its best rate in one figure, then all rates of each variant."""
    last = max((result.reading.step for result in results.cells), default=0)
    keys = dict.fromkeys([results.metric, "train/loss"])
    at_best = [row for variant in results.variants if (row := _best_row(variant)) is not None]
    rates = results.grid.rates
    charts = []
    for key in keys:
        lines = [
            line
            for row in at_best
            for line in _seed_lines(row, key, logs, *_look_of(results, row), name=named(results, row))
        ]
        title = f"{label(key)}{', each at its best rate' if rates else ''}"
        charts.append(_curves(title, lines, key, last))
    if rates:
        shades = _shades(len(rates.choices))
        for variant in results.variants:
            lines = [
                line
                for row, choice, shade in zip(variant.rows, rates.choices, shades, strict=True)
                for line in _seed_lines(row, results.metric, logs, shade, "line", name=choice.label)
            ]
            charts.append(
                _curves(f"{label(results.metric)}, {clean(variant.name)}, by rate", lines, results.metric, last)
            )
    return [chart for chart in charts if chart is not None]


def _curves(title: str, lines: Sequence[Line], key: str, last: int) -> Chart | None:
    if not any(len(line.series.finite) for line in lines):
        return None
    caption = "A line a seed" + ("; long ones are smoothed." if key == "train/loss" else ".")
    return line_chart(title, lines, last_step=last, percent=key.endswith("accuracy"), caption=caption)


def _seed_lines(
    row: Row, key: str, logs: Mapping[str, Mapping[str, Series]], color: str, style, *, name: str
) -> list[Line]:
    """One line a seed; that of a run that diverged ends in a value that is no number."""
    out = []
    for result in row.results:
        series = logs.get(result.cell.name, {}).get(key)
        if series is None:
            continue
        if key == "train/loss" and len(series.finite) >= 12:
            series = smoothed(series.finite)
        if result.state == "diverged" and not len(series.non_finite_steps):
            steps, values = series.steps, series.values
            keep = steps < result.reading.step
            series = Series(np.append(steps[keep], result.reading.step), np.append(values[keep], math.nan))
        few = {"marker": "o", "markersize": 3.5} if len(series) < 12 else {}
        out.append(Line(clean(name) if not out else "", series, color, style, few))
    return out


def _best_row(variant: Variant) -> Row | None:
    if not variant.rates:
        return variant.rows[0]
    return None if variant.best is None else variant.rows[variant.best]


def _look_of(results: Results, row: Row):
    index = next(index for index, variant in enumerate(results.variants) if row in variant.rows)
    return look(index)[0], ("line", "dashed", "dotted")[index // len(PALETTE) % 3]


def _shades(count: int) -> list[str]:
    """Colours from dark to light that differ in print and for the colour-blind, none too light for white paper."""
    return [to_hex(matplotlib.colormaps["plasma"](0.8 * index / max(1, count - 1))) for index in range(count)]
