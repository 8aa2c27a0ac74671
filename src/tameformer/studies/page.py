"""The results of a comparison as one HTML file that needs nothing beside it."""

from pathlib import Path

import numpy as np

from tameformer.record import LOG, RunReader, write_atomically
from tameformer.report.page import render
from tameformer.report.read import Series, clean, gather_series
from tameformer.report.sections import Section
from tameformer.report.tables import Table
from tameformer.report.wording import label, number
from tameformer.studies.figures import curve_charts, difference_chart, dot_chart, rate_chart
from tameformer.studies.results import Results
from tameformer.studies.tables import difference_table, named, rate_table, result_table, trouble_table, with_interval


@np.errstate(over="ignore", invalid="ignore")  # an exploding loss may be near the largest float
def write_page(results: Results, name: str) -> Path:
    """Write the page into the comparison's folder under a name; returns its path."""
    grid = results.grid
    state, level, headline = _headline(results)
    html = render(
        title=f"{Path(grid.recipe).stem}: {' and '.join(factor.name for factor in grid.factors) or 'seeds'}",
        kind="Comparison",
        state=state,
        level=level,
        headline=headline,
        findings=(),
        numbers=_numbers(results),
        remarks=(),
        lead=[table for table in (rate_table(results), result_table(results, results.metrics)) if table.rows],
        keys=(),
        sections=[section for section in _sections(results) if section.charts or section.tables],
    )
    path = results.folder / name
    write_atomically(path, html)
    return path


def _headline(results: Results) -> tuple[str, str, str]:
    counts = results.counts()
    known = [variant for variant in results.variants if variant.best is not None]
    left = counts.get("waiting", 0) + counts.get("interrupted", 0)
    if left:
        return "", "note", f"{len(results.cells) - left} of {len(results.cells)} runs have ended"
    if not known:
        return "", "bad", "No variant has runs that all ended"
    best = min(known, key=lambda variant: variant.mean_losses[variant.best or 0] or 0.0)
    row = best.rows[best.best or 0]
    said = f"Lowest mean {label(results.loss).lower()}: {with_interval(results.loss, row.metric(results.loss))}"
    return "finished", "good", f"{said}, with {named(results, row) or 'all seeds'}"


def _numbers(results: Results) -> list[tuple[str, str, str]]:
    counts = results.counts()
    rest = ", ".join(f"{count} {state}" for state, count in counts.items() if state != "finished")
    out = [
        ("Runs finished", f"{counts.get('finished', 0)} of {len(results.cells)}", rest),
        ("Seeds", f"{len(results.grid.seeds)}", clean(", ".join(map(str, results.grid.seeds)))),
    ]
    for variant in results.variants[:4] if results.grid.rates else ():
        usable = "none" if variant.usable is None else number(variant.usable[1])
        out.append(("Highest usable rate", usable, clean(variant.name)))
    return out


def _sections(results: Results) -> list[Section]:
    rates = results.grid.rates
    charts = [rate_chart(results)] if rates and any(row.metric(results.metric) for row in results.rows) else []
    if not rates and any(row.metric(results.metric) for row in results.rows):
        charts.append(dot_chart(results))
    if any(one.difference is not None for one in results.differences):
        charts.append(difference_chart(results))
    curves, trouble = curve_charts(results, _logs(results)), trouble_table(results)
    return [
        Section("Results", tuple(charts), tuple(table for table in (difference_table(results),) if table.rows)),
        Section("Learning curves", tuple(curves)),
        Section("How it was made", tables=(_made(results), *([trouble] if trouble.rows else []))),
    ]


def _logs(results: Results) -> dict[str, dict[str, Series]]:
    folders = {cell.name: results.folder / cell.name for cell in results.grid.cells}
    return {
        name: gather_series(RunReader(folder).log()) for name, folder in folders.items() if (folder / LOG).is_file()
    }


def _made(results: Results) -> Table:
    grid = results.grid
    rows = [
        ("recipe", grid.recipe),
        *((factor.key, ", ".join(choice.label for choice in factor.choices)) for factor in grid.factors),
        ("seeds", ", ".join(map(str, grid.seeds))),
        ("settings of all runs", " ".join(grid.arguments) or "those of the recipe"),
        ("loss before training", results.initial_source),
    ]
    return Table("Settings", ("what", "value"), tuple((clean(key), clean(value)) for key, value in rows))
