"""The results of a race as files: `race.json` with everything, `race.csv` with a line a run."""

import csv
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tameformer.record import write_atomically
from tameformer.studies.race_results import Entrant, RaceResults
from tameformer.studies.write import interval_values, write_json

JSON, CSV = "race.json", "race.csv"


def write_results(results: RaceResults) -> tuple[Path, Path]:
    """Write both files into the race's folder; returns their paths."""
    paths = results.folder / JSON, results.folder / CSV
    write_json(paths[0], describe(results))
    write_atomically(paths[1], as_csv(results))
    return paths


def describe(results: RaceResults) -> dict[str, Any]:
    """All that a race found, as plain values; docs/race.md says what each key means."""
    best = results.best
    return {
        "recipe": results.grid.recipe,
        "arguments": list(results.grid.arguments),
        "vary": {factor.key: [choice.label for choice in factor.choices] for factor in results.grid.factors[:-1]},
        "metric": results.metric,
        "mode": results.mode,
        "budget": results.budget,
        "plan": {**asdict(results.plan), "cost": results.plan.cost},
        "run_all": results.run_all,
        "spent": results.spent,
        "counts": dict(results.counts()),
        "best": None if best is None else {
            "folder": best.name,
            "checkpoint": None if results.checkpoint is None else str(results.checkpoint.relative_to(results.folder)),
            "value": best.final,
        },
        "final": {"mean": interval_values(results.mean), "standard_deviation": results.spread},
        "early": {"mean": interval_values(results.early_mean), "standard_deviation": results.early_spread},
        "failed": None if results.failures is None else {
            **asdict(results.failures), "no_better_than": "before training" if results.failed_at is None else results.failed_at
        },
        "expected_best": {
            "early": results.expected_best(early=True), "as_far_as_run": results.expected_best(early=False)
        },
        "rank_correlation": results.rank,
        "missed": results.missed,
        "effects": [asdict(one) for one in results.effects],
        "differences": [{"variant": name, "difference": interval_values(one)} for name, one in results.differences],
        "runs": [_run(results, one) for one in results.entrants],
    }  # fmt: skip


def _run(results: RaceResults, one: Entrant) -> dict[str, Any]:
    return {
        "folder": one.name,
        "variant": one.variant,
        "seed": one.weights,
        "data_seed": one.order,
        "state": one.result.state,
        "goes_on": one.goes_on,
        "step": one.result.reading.step,
        "initial": one.initial,
        "early": one.early,
        "final": one.final,
        "has_failed": one.value is not None and results.has_failed(one),
        "message": one.result.reading.message,
    }


def as_csv(results: RaceResults) -> str:
    """One line a run, after one of headings; an empty field is a value that there is not."""
    out = io.StringIO()
    rows = [_run(results, one) for one in results.entrants]
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
