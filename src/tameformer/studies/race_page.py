"""The results of a race as tables for the terminal, and as one HTML file that needs nothing beside it."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from tameformer.record import LOG, RunReader, write_atomically
from tameformer.report.curves import Line, Mark, line_chart
from tameformer.report.drawing import BLUE, MUTED, NARROW, VERMILION, Chart, drawing
from tameformer.report.page import render
from tameformer.report.read import clean, gather_series
from tameformer.report.sections import Section
from tameformer.report.tables import Table
from tameformer.report.wording import label, quantity
from tameformer.studies.race_results import Entrant, RaceResults
from tameformer.studies.statistics import Interval
from tameformer.studies.tables import DASH, brief, with_interval


def write_page(results: RaceResults, name: str) -> Path:
    """Write the page into the race's folder under a name; returns its path."""
    plan, grid = results.plan, results.grid
    best = results.best
    if results.is_over:
        level, headline = ("bad", "No run reached its end") if best is None else ("good", _said(results, best))
    else:
        done = sum(one.early is not None for one in results.entrants)
        level = "note"
        headline = f"{done} of {plan.starts} runs have been judged, {len(results.finals)} have reached their end"
    html = render(
        title=f"{Path(grid.recipe).stem}: race of {plan.starts}",
        kind="Race",
        state="finished" if results.is_over and best is not None else "",
        level=level,
        headline=headline,
        findings=(),
        numbers=_numbers(results),
        remarks=(),
        lead=[table for table in summary_tables(results) if table.rows],
        keys=(),
        sections=[section for section in _sections(results) if section.charts or section.tables],
    )
    path = results.folder / name
    write_atomically(path, html)
    return path


def _said(results: RaceResults, best: Entrant) -> str:
    seeds = f"seed {best.weights}, data_seed {best.order}"
    return f"Best {label(results.metric).lower()}: {quantity(results.metric, best.final or 0.0)}, with " + clean(
        f"{best.variant}, {seeds}" if best.variant else seeds
    )


def _numbers(results: RaceResults) -> list[tuple[str, str, str]]:
    plan, failures = results.plan, results.failures
    out = [
        ("Started", f"{plan.starts}", f"judged after {100 * plan.share:g} % of the run"),
        (
            "Went on",
            f"{len([one for one in results.entrants if one.goes_on])}",
            f"{len(results.finals)} reached their end",
        ),
        ("Spent", f"{results.spent:.3g} runs", _of_budget(results)),
    ]
    if failures is not None:
        out.append(("Failed", f"{failures.count} of {failures.n}", _percent_range(failures.low, failures.high)))
    return out


def _of_budget(results: RaceResults) -> str:
    if results.run_all:
        return f"all to the end; the race alone is {results.plan.cost:g}"
    return f"of {results.budget:g}; all to the end would be {results.plan.starts}"


def _percent_range(low: float, high: float) -> str:
    return f"{100 * low:.0f} to {100 * high:.0f} %"


def summary_tables(results: RaceResults) -> list[Table]:
    """What the race says, then what did it, then the runs that reached their end."""
    metric, failures, rank = results.metric, results.failures, results.rank
    expected = results.expected_best(early=True)
    rows = [
        ("all, when judged", _with_spread(metric, results.early_mean, results.early_spread)),
        ("those that reached their end", _with_spread(metric, results.mean, results.spread)),
    ]
    if failures is not None:
        below = "their start" if results.failed_at is None else quantity(metric, results.failed_at)
        interval = _percent_range(failures.low, failures.high)
        rows.append(
            (f"failed: broke, or no better than {below}", f"{failures.count} of {failures.n} (95 %: {interval})")
        )
    if expected:
        some = sorted({n for n in (1, 5, 10, 20, 50, 100) if n <= len(expected)} | {len(expected)})
        rows.append(
            ("expected best of n, when judged", ", ".join(f"{n}: {quantity(metric, expected[n - 1])}" for n in some))
        )
    if rank is not None:
        over = "all" if results.run_all else "those that went on"
        rows.append((f"rank correlation of early and final, over {over}", f"{rank:.2f}"))
    if results.missed is not None:
        among = f"the best {results.plan.continued} when judged"
        nothing = f"nothing: the best of all is among {among}"
        found = f"{quantity(metric, results.missed)}: the best of all is not among {among}"
        rows.append(("what stopping early would have missed", found if results.missed > 0 else nothing))
    if results.run_all:
        cost, starts = results.plan.cost, results.plan.starts
        rows.append(
            (
                "what stopping early would have saved",
                f"{starts - cost:.3g} of {starts} runs, {100 * (1 - cost / starts):.0f} %",
            )
        )
    rows += [
        (f"{name} minus {first}, when judged", with_interval(metric, one)) for first, (name, one) in _named(results)
    ]
    explained = tuple(
        (one.name, f"{100 * one.share:.0f} %", str(one.degrees), DASH if one.p_value is None else f"{one.p_value:.2g}")
        for one in results.effects
    )
    note = "Of the early values of all runs, without interactions; p of the F test. The rest is the two together, and noise."
    final = tuple(
        (str(place), *_seeds(one), quantity(metric, one.early or 0.0), quantity(metric, one.final or 0.0), one.name)
        for place, one in enumerate(results.finals, start=1)
    )
    trouble = tuple(
        (one.name, one.result.state, f"{one.result.reading.step:,}", clean(brief(one.result.reading.message)))
        for one in results.entrants
        if one.result.state in ("diverged", "failed", "interrupted")
    )
    columns = ("", *(["variant"] if results.finals and results.finals[0].variant else []), "seed", "data_seed",
               "when judged", "at the end", "folder")  # fmt: skip
    return [
        Table(label(metric), ("what", "value"), tuple((clean(what), clean(value)) for what, value in rows)),
        Table("What the spread comes from", ("factor", "share", "degrees of freedom", "p"), explained, note=note),
        Table("Runs that reached their end", columns, final),
        Table("Runs that did not end well", ("run", "state", "step", "message"), trouble),
    ]


def _named(results: RaceResults) -> list[tuple[str, tuple[str, Interval | None]]]:
    first = results.entrants[0].variant
    return [(first, one) for one in results.differences]


def _seeds(one: Entrant) -> tuple[str, ...]:
    seeds = (str(one.weights), str(one.order))
    return (clean(one.variant), *seeds) if one.variant else seeds


def _with_spread(metric: str, found: Interval | None, spread: float | None) -> str:
    if found is None:
        return DASH
    return f"{with_interval(metric, found)}, standard deviation {DASH if spread is None else quantity(metric, spread)}"


def _sections(results: RaceResults) -> list[Section]:
    metric = results.metric
    charts = [chart for chart in (_best_chart(results), _rank_chart(results)) if chart is not None]
    lines = []
    for name, color, members in _kinds(results, results.entrants):
        for one in members:
            if (results.folder / one.name / LOG).is_file():
                series = gather_series(RunReader(results.folder / one.name).log())
                if metric in series:
                    known = any(line.label == name for line in lines)
                    lines.append(
                        Line("" if known else name, series[metric], color, "faint" if color == MUTED else "line")
                    )
    last = max((one.length or 0 for one in results.entrants), default=0)
    judged = Mark(round(results.plan.share * last), "judged", MUTED)
    curves = (
        [line_chart(label(metric), lines, last_step=last, percent=_percent(metric), marks=[judged])] if lines else []
    )
    grid, plan = results.grid, results.plan
    made = [
        ("recipe", grid.recipe),
        *((factor.key, ", ".join(choice.label for choice in factor.choices)) for factor in grid.factors[:-1]),
        ("budget, runs", f"{results.budget:g}"),
        ("plan", f"{plan.starts} starts to {plan.share:g} of the run, {plan.continued} to its end"),
        ("settings of all runs", " ".join(grid.arguments) or "those of the recipe"),
    ]
    table = Table("Settings", ("what", "value"), tuple((clean(key), clean(value)) for key, value in made))
    return [
        Section("Luck", tuple(charts)),
        Section("Learning curves", tuple(curves)),
        Section("How it was made", tables=(table,)),
    ]


def _kinds(results: RaceResults, some: Sequence[Entrant]) -> list[tuple[str, str, list[Entrant]]]:
    """Runs by what became of them, or would have if all had not gone on: what to call them, and their colour."""
    ahead = {one.name for one in (results.leaders if results.run_all else results.entrants) if one.goes_on}
    others = [one for one in some if one is not results.best]
    found = [
        ("would be stopped" if results.run_all else "stopped", MUTED, [one for one in others if one.name not in ahead]),
        ("would go on" if results.run_all else "went on", BLUE, [one for one in others if one.name in ahead]),
        ("the best", VERMILION, [one for one in some if one is results.best]),
    ]
    return [kind for kind in found if kind[2]]


def _percent(metric: str) -> bool:
    return metric.endswith("accuracy")


def _best_chart(results: RaceResults) -> Chart | None:
    """The expected best of n runs."""
    early, run = results.expected_best(early=True), results.expected_best(early=False)
    if len(early) < 2:
        return None
    title = f"Expected best {label(results.metric).lower()} of n runs"
    legend = [
        ("when judged", MUTED, "line"),
        ("at the end" if results.run_all else "as far as each was run", BLUE, "line"),
    ]

    def draw(axes: Axes) -> None:
        for values, (_, color, _) in zip((early, run), legend, strict=True):
            axes.plot(range(1, len(values) + 1), values, color=color)
        axes.set_xlabel("runs")

    caption = "Dodge et al. 2019. Runs that were stopped count as they stood then." * (not results.run_all)
    return _chart(title, draw, caption or "Dodge et al. 2019.", legend, percent=_percent(results.metric))


def _rank_chart(results: RaceResults) -> Chart | None:
    """Early against final, a point a run."""
    known = [one for one in results.finals if one.early is not None and math.isfinite(one.early)]
    if len(known) < 2:
        return None

    kinds = _kinds(results, known)

    def draw(axes: Axes) -> None:
        for _, color, members in kinds:
            places = [one.early or 0.0 for one in members], [one.final or 0.0 for one in members]
            axes.plot(*places, "o", color=color, markersize=5)
        axes.set_xlabel(f"{label(results.metric).lower()} when judged")
        if _percent(results.metric):
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))

    rank = "" if results.rank is None else f" Rank correlation {results.rank:.2f}."
    caption = f"A point a run that reached its end.{rank}"
    legend = [(name, color, "point") for name, color, _ in kinds]
    return _chart("Final against early", draw, caption, legend, percent=_percent(results.metric))


def _chart(title: str, draw, caption: str, legend: Sequence[tuple[str, str, str]], *, percent: bool) -> Chart:
    height = 280
    with np.errstate(over="ignore", invalid="ignore"), drawing(NARROW, height) as (figure, save):
        axes = figure.add_axes((64 / NARROW, 44 / height, (NARROW - 84) / NARROW, (height - 60) / height))
        draw(axes)
        axes.grid(axis="y")
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
        svg = save(title)
    return Chart(title, svg, caption, legend=tuple(legend))
