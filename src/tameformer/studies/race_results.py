"""From the folders of a race to what they say: the best model, spread, failures, the best of n, what stopping missed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tameformer.config import flatten, read_yaml
from tameformer.errors import ConfigError
from tameformer.record import BEST, CONFIG, LOG, RunReader
from tameformer.studies.cells import State, read_cell
from tameformer.studies.grid import Cell, Grid
from tameformer.studies.race_plan import Plan, Race
from tameformer.studies.race_statistics import Effect, Share, effects, expected_max, rank_correlation, share
from tameformer.studies.results import CellResult
from tameformer.studies.statistics import Interval, interval


@dataclass(frozen=True)
class Entrant:
    """One run of a race."""

    result: CellResult
    goes_on: bool
    """Whether it is one of those that are continued."""
    early: float | None
    """The metric when it was judged: NaN when it had diverged, None when it has not come that far."""
    final: float | None
    """The metric of the model that a run to the end leaves; NaN when it diverged, None when it has not come that far."""
    initial: float | None
    """The metric before training."""
    length: int | None
    """Steps of a whole run."""

    @property
    def name(self) -> str:
        """Its folder in that of the race."""
        return self.result.cell.name

    @property
    def weights(self) -> int:
        """Seed of the weights."""
        return self.result.cell.seed

    @property
    def order(self) -> int:
        """Seed of the order of the data."""
        return int(self.result.cell.choices[-1].label)

    @property
    def variant(self) -> str:
        """What was varied beside the seeds."""
        return ", ".join(choice.label for choice in self.result.cell.choices[:-1])

    @property
    def value(self) -> float | None:
        """How good it is as far as it has come."""
        return self.early if self.final is None else self.final


@dataclass(frozen=True)
class RaceResults:
    """All that a race found, as far as its runs have come."""

    folder: Path
    grid: Grid
    plan: Plan
    budget: float
    metric: str
    mode: str
    failed_at: float | None
    """A run that is no better has failed; None takes what each had before training."""
    run_all: bool
    entrants: tuple[Entrant, ...]

    def better(self, value: float) -> float:
        """The value as one of which more is better."""
        return value if self.mode == "max" else -value

    @cached_property
    def finals(self) -> list[Entrant]:
        """The runs that reached their end, the best first."""
        known = [one for one in self.entrants if one.final is not None and math.isfinite(one.final)]
        return sorted(known, key=lambda one: -self.better(one.final or 0.0))

    @property
    def best(self) -> Entrant | None:
        """The run with the best final value."""
        return self.finals[0] if self.finals else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of the best model."""
        if self.best is None:
            return None
        run = self.folder / self.best.name
        steps = sorted((run / "checkpoints").glob("step-*"))
        return run / "checkpoints" / _best_name(run) if _best_name(run) else steps[-1] if steps else None

    @property
    def mean(self) -> Interval | None:
        """Mean and interval of the final values. Those of the best few when not all went on: no estimate for a fresh run."""
        return interval([one.final for one in self.finals if one.final is not None])

    @property
    def spread(self) -> float | None:
        """Standard deviation of the final values."""
        return _deviation([one.final for one in self.finals if one.final is not None])

    @property
    def early_mean(self) -> Interval | None:
        """Mean and interval of all runs when they were judged."""
        return interval(self._finite_early)

    @property
    def early_spread(self) -> float | None:
        """Standard deviation of all runs when they were judged."""
        return _deviation(self._finite_early)

    @property
    def _finite_early(self) -> list[float]:
        return [one.early for one in self.entrants if one.early is not None and math.isfinite(one.early)]

    @cached_property
    def failures(self) -> Share | None:
        """Runs that broke, or are no better than they may be, as far as each has come, of all that have been judged."""
        judged = [one for one in self.entrants if one.value is not None or one.result.state in ("failed", "diverged")]
        return share(sum(map(self.has_failed, judged)), len(judged)) if judged else None

    def has_failed(self, one: Entrant) -> bool:
        """Whether a run broke, or is no better than it may be."""
        if one.value is None or not math.isfinite(one.value):
            return True
        threshold = one.initial if self.failed_at is None else self.failed_at
        return threshold is not None and self.better(one.value) <= self.better(threshold)

    def expected_best(self, *, early: bool) -> list[float]:
        """Expected best of 1, 2, ... runs; one that diverged counts as the worst that there is.

        Args:
            early: Of all runs when they were judged. Else as far as each has come: unless all went on, those that were
                stopped might have become better, so that this lies below what whole runs give.
        """
        values = [found for one in self.entrants if (found := one.early if early else one.value) is not None]
        finite = [self.better(value) for value in values if math.isfinite(value)]
        if not finite:
            return []
        counted = [self.better(value) if math.isfinite(value) else min(finite) for value in values]
        return [self.better(expected_max(counted, n)) for n in range(1, len(counted) + 1)]

    @cached_property
    def rank(self) -> float | None:
        """Spearman's correlation of early and final values over the runs that went on, which are all of them in `run_all`."""
        known = [(one.early, one.final) for one in self.finals if one.early is not None and math.isfinite(one.early)]
        return rank_correlation([early for early, _ in known], [final or 0.0 for _, final in known])

    @cached_property
    def leaders(self) -> list[Entrant]:
        """Those that the plan continues: the best when they were judged, earlier ones first where it is the same."""
        known = [one for one in self.entrants if one.early is not None and math.isfinite(one.early)]
        return sorted(known, key=lambda one: -self.better(one.early or 0.0))[: self.plan.continued]

    @cached_property
    def missed(self) -> float | None:
        """By how much the best of all runs beats the best of those that the race continues; known when all went on."""
        if not self.run_all or any(one.final is None for one in self.entrants):
            return None
        finals = [self.better(one.final or 0.0) for one in self.leaders]
        finals = [value for value in finals if math.isfinite(value)]
        if self.best is None or not finals:
            return None
        return self.better(self.best.final or 0.0) - max(finals)

    @property
    def spent(self) -> float:
        """Steps taken, in whole runs."""
        return math.fsum(one.result.reading.step / one.length for one in self.entrants if one.length)

    @cached_property
    def effects(self) -> list[Effect]:
        """What the weights, the order, and the variants did to the early values: those of all runs, chosen by nothing."""
        known = [one for one in self.entrants if one.early is not None and math.isfinite(one.early)]
        levels = {"weights": [one.weights for one in known], "order of data": [one.order for one in known],
                  "variant": [one.variant for one in known]}  # fmt: skip
        return effects([one.early for one in known if one.early is not None], levels)

    @cached_property
    def differences(self) -> list[tuple[str, Interval | None]]:
        """Each variant's early values minus the first's, pair of seeds by pair of seeds."""
        by_variant: dict[str, dict[tuple[int, int], float]] = {}
        for one in self.entrants:
            found = by_variant.setdefault(one.variant, {})
            if one.early is not None and math.isfinite(one.early):
                found[one.weights, one.order] = one.early
        first, *others = by_variant
        base = by_variant[first]
        return [
            (name, interval([value - base[seeds] for seeds, value in by_variant[name].items() if seeds in base]))
            for name in others
        ]

    def counts(self) -> dict[State, int]:
        """How many runs are in which state."""
        found: dict[State, int] = {}
        for one in self.entrants:
            found[one.result.state] = found.get(one.result.state, 0) + 1
        return found

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to run, whatever came of it."""
        left = ("waiting", "interrupted")
        return not any(
            one.result.state in left or (one.goes_on and one.result.state == "paused") for one in self.entrants
        )


def read_race(race: Race, folder: Path, goes_on: Sequence[str]) -> RaceResults:
    """What the runs of a race say.

    Args:
        race: Which runs there are.
        folder: Where they are.
        goes_on: The names of those that are continued.

    Raises:
        ConfigError: The runs did not measure the metric.
        RecordError: A log is damaged.
    """
    return RaceResults(
        folder,
        grid=race.grid,
        plan=race.plan,
        budget=race.budget,
        metric=race.metric,
        mode=race.mode,
        failed_at=race.failed,
        run_all=race.run_all,
        entrants=tuple(_entrant(folder / cell.name, cell, race.metric, cell.name in goes_on) for cell in race.cells),
    )


def _entrant(run: Path, cell: Cell, metric: str, goes_on: bool) -> Entrant:
    reading = read_cell(run)
    result = CellResult(cell, reading)
    events = RunReader(run).events() if (run / LOG).is_file() else []
    length = next((int(event["max_steps"]) for event in events if "max_steps" in event), None)
    final = result.value(metric)
    if final is not None and math.isfinite(final) and (name := _best_name(run)):
        # The model that is kept is the one of this step, if it was kept for this metric: else the last one counts.
        kept = _value_at(run, int(name.removeprefix("step-")), metric)
        final = final if kept is None or not _is_kept_for(run, metric) else kept
    return Entrant(result, goes_on, early_value(run, metric), final, result.initial(metric), length)


def _best_name(run: Path) -> str:
    return (run / BEST).read_text(encoding="utf-8").strip() if (run / BEST).is_file() else ""


def _is_kept_for(run: Path, metric: str) -> bool:
    return flatten(read_yaml(run / CONFIG)).get("checkpoint.best_metric") == metric


def _value_at(run: Path, step: int, metric: str) -> float | None:
    found = [line[metric] for line in RunReader(run).log() if line["step"] == step and metric in line]
    return found[-1] if found else None


def early_value(run: Path, metric: str) -> float | None:
    """The metric when a run was judged, which its events keep whatever came after: NaN when it had diverged by then.

    Raises:
        ConfigError: It was judged, but does not measure the metric.
    """
    events = RunReader(run).events() if (run / LOG).is_file() else []
    paused = next((event for event in events if event.get("kind") == "pause"), None)
    if paused is not None:
        if metric not in paused:
            known = ", ".join(key for key in paused if key.startswith("eval/"))
            raise ConfigError(
                f"the runs do not measure {metric}; --metric can be {known or 'none, without an evaluation'}"
            )
        return float(paused[metric])
    reading = read_cell(run)
    if reading.state == "diverged":
        return math.nan
    return reading.last.get(metric) if reading.state == "finished" else None


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
