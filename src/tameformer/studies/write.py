"""The results of a comparison as files: `compare.json` with everything, `compare.csv` with a line a run."""

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tameformer.record import encode_values, write_atomically
from tameformer.studies.results import Results, Row, Variant
from tameformer.studies.statistics import Interval

JSON, CSV = "compare.json", "compare.csv"


def write_results(results: Results) -> tuple[Path, Path]:
    """Write both files into the comparison's folder; returns their paths."""
    paths = results.folder / JSON, results.folder / CSV
    write_json(paths[0], describe(results))
    write_atomically(paths[1], as_csv(results))
    return paths


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Values as a file to read and to load, whole or not at all."""
    text = json.dumps(encode_values(values), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")


def describe(results: Results) -> dict[str, Any]:
    """All that a comparison found, as plain values; docs/compare.md says what each key means."""
    grid = results.grid
    return {
        "recipe": grid.recipe,
        "arguments": list(grid.arguments),
        "vary": {factor.key: [choice.label for choice in factor.choices] for factor in grid.factors},
        "seeds": list(grid.seeds),
        "metric": results.metric,
        "loss": results.loss,
        "initial_source": results.initial_source,
        "usable_tolerance": results.tolerance,
        "counts": dict(results.counts()),
        "rows": [_row(results, row) for row in results.rows],
        "variants": [_variant(variant, results.variants[0]) for variant in results.variants],
        "differences": [
            {
                "variant": difference.variant,
                "rate": None if difference.rate is None else difference.rate.number,
                "at_best_rates": difference.at_best_rates,
                "difference": interval_values(difference.difference),
            }
            for difference in results.differences
        ],
        "cells": [
            {
                "folder": result.cell.name,
                "values": _values(results, result.cell.choices),
                "seed": result.cell.seed,
                "state": result.state,
                "step": result.reading.step,
                "message": result.reading.message,
                "initial": result.initial(results.loss),
                "metrics": {key: result.value(key) for key in results.metrics},
            }
            for result in results.cells
        ],
    }


def _row(results: Results, row: Row) -> dict[str, Any]:
    return {
        "values": _values(results, row.choices),
        "runs": len(row.results),
        "finished": row.count("finished"),
        "diverged": row.count("diverged"),
        "failed": row.count("failed"),
        "metrics": {key: interval_values(row.metric(key)) for key in results.metrics},
    }


def _variant(variant: Variant, baseline: Variant) -> dict[str, Any]:
    best = variant.best if variant.rates else None
    return {
        "name": variant.name,
        "sensitivity": interval_values(variant.sensitivity),
        "usable_rates": None if variant.usable is None else list(variant.usable),
        "highest_usable_rate_to_first": variant.highest_to(baseline),
        "usable_width_to_first": variant.width_to(baseline),
        "best_rate": None if best is None else variant.rates[best],
        "mean_losses": list(variant.mean_losses),
    }


def _values(results: Results, choices: tuple[Any, ...]) -> dict[str, Any]:
    named = zip(results.grid.factors, choices, strict=True)
    return {factor.key: choice.label if choice.number is None else choice.number for factor, choice in named}


def interval_values(found: Interval | None) -> dict[str, Any] | None:
    """An interval as plain values."""
    return None if found is None else {"mean": found.mean, "half_width": found.half_width, "n": found.n}


def as_csv(results: Results) -> str:
    """One line a run, after one of headings; an empty field is a value that there is not."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = [factor.key for factor in results.grid.factors]
    writer.writerow(["folder", *keys, "seed", "state", "step", f"initial {results.loss}", *results.metrics, "message"])
    for result in results.cells:
        values = [result.value(key) for key in results.metrics]
        writer.writerow(
            [
                result.cell.name,
                *(choice.label for choice in result.cell.choices),
                result.cell.seed,
                result.state,
                result.reading.step,
                result.initial(results.loss),
                *values,
                result.reading.message,
            ]
        )
    return out.getvalue()
