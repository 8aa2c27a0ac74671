"""From the cells of a comparison to what they say: means over seeds, sensitivity, usable rates, paired differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tameformer.errors import ConfigError
from tameformer.report.wording import direction
from tameformer.studies.cells import Reading, State, read_cell
from tameformer.studies.grid import RATE, Cell, Choice, Grid
from tameformer.studies.statistics import Interval, clipped, interval, learning_rate_sensitivity, usable_range

LOSS = "eval/loss"
USABLE = 0.1


@dataclass(frozen=True)
class CellResult:
    """One run and its measurements."""

    cell: Cell
    reading: Reading

    @property
    def state(self) -> State:
        """The run's state; one that ended with an evaluation loss that is no number has diverged, too."""
        ended = self.reading.last.get(LOSS)
        if self.reading.state == "finished" and ended is not None and not math.isfinite(ended):
            return "diverged"
        return self.reading.state

    def value(self, key: str) -> float | None:
        """The last value of a measurement: NaN for a run that diverged, None for one that has not ended."""
        if self.state == "diverged":
            return math.nan
        return self.reading.last.get(key) if self.state == "finished" else None

    def initial(self, key: str) -> float | None:
        """The measurement before training, else its first telling; None when that is not finite."""
        value = self.reading.first.get(key, (0, math.nan))[1]
        return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Row:
    """All seeds of one combination of values."""

    choices: tuple[Choice, ...]
    results: tuple[CellResult, ...]

    def count(self, state: State) -> int:
        """How many runs are in this state."""
        return sum(result.state == state for result in self.results)

    def metric(self, key: str) -> Interval | None:
        """Mean and interval over the seeds whose run finished; those that diverged are counted apart."""
        values = [result.value(key) for result in self.results if result.state == "finished"]
        return interval([value for value in values if value is not None])


@dataclass(frozen=True)
class Variant:
    """One combination of all that is varied but the learning rate, over all rates."""

    choices: tuple[Choice, ...]
    rows: tuple[Row, ...]
    """One row a rate, ascending; a single one when the rate is not varied."""
    rates: tuple[float, ...]
    loss: str
    """Key of the loss that sensitivity and usable rates are about."""
    tolerance: float

    @property
    def name(self) -> str:
        """The values as one phrase."""
        return ", ".join(choice.label for choice in self.choices) or "all"

    def losses(self, row: Row) -> list[float] | None:
        """Final loss of each seed, no worse than before training; None while a run is missing."""
        out: list[float] = []
        for result in row.results:
            value, initial = result.value(self.loss), self._initial(result.cell.seed)
            if value is None or initial is None:
                return None
            out += clipped([value], initial)
        return out

    @cached_property
    def mean_losses(self) -> list[float | None]:
        """Mean over the seeds of each rate's final loss, no worse than before training; None while one is missing."""
        return [None if (losses := self.losses(row)) is None else math.fsum(losses) / len(losses) for row in self.rows]

    @cached_property
    def sensitivity(self) -> Interval | None:
        """Learning-rate sensitivity: mean and interval over the seeds whose whole grid has ended."""
        if not self.rates:
            return None
        found = []
        for index, first in enumerate(self.rows[0].results):
            values = [row.results[index].value(self.loss) for row in self.rows]
            known = [value for value in values if value is not None]
            initial = self._initial(first.cell.seed)
            if initial is not None and len(known) == len(values):
                found.append(learning_rate_sensitivity(known, initial))
        return interval(found)

    @cached_property
    def usable(self) -> tuple[float, float] | None:
        """Lowest and highest rate of the widest usable stretch; rates with a missing run are left out."""
        known = [(rate, loss) for rate, loss in zip(self.rates, self.mean_losses, strict=True) if loss is not None] \
            if self.rates else []  # fmt: skip
        initials = [value for result in self.rows[0].results if (value := self._initial(result.cell.seed)) is not None]
        if not known or not initials:
            return None
        initial = math.fsum(initials) / len(initials)
        return usable_range([rate for rate, _ in known], [loss for _, loss in known], initial, tolerance=self.tolerance)

    def highest_to(self, baseline: "Variant") -> float | None:
        """The highest usable rate as multiple of the baseline's; None where either has none."""
        return None if self.usable is None or baseline.usable is None else self.usable[1] / baseline.usable[1]

    def width_to(self, baseline: "Variant") -> float | None:
        """Highest over lowest usable rate, as multiple of the baseline's; None where either has none."""
        if self.usable is None or baseline.usable is None:
            return None
        return (self.usable[1] / self.usable[0]) / (baseline.usable[1] / baseline.usable[0])

    @cached_property
    def best(self) -> int | None:
        """Index of the row with the lowest mean loss."""
        known = [(loss, index) for index, loss in enumerate(self.mean_losses) if loss is not None]
        return min(known)[1] if known else None

    def _initial(self, seed: int) -> float | None:
        """The loss before training: that of the first run with this seed that measured it, since no rate changes it."""
        found = (result.initial(self.loss) for row in self.rows for result in row.results if result.cell.seed == seed)
        return next((value for value in found if value is not None), None)


@dataclass(frozen=True)
class Difference:
    """A variant minus the first one, seed by seed."""

    variant: str
    rate: Choice | None
    """The rate of both; None when the rate is not varied, or each has its own best one."""
    at_best_rates: bool
    difference: Interval | None
    """Over the seeds for which both finished."""


@dataclass(frozen=True)
class Results:
    """All that a comparison found, as far as its runs have come."""

    folder: Path
    grid: Grid
    metric: str
    tolerance: float
    cells: tuple[CellResult, ...]

    @cached_property
    def loss(self) -> str:
        """What sensitivity and usable rates are about: the metric, where lower is better, else the evaluation loss."""
        return self.metric if direction(self.metric) == "lower" else LOSS

    @cached_property
    def initial_source(self) -> str:
        """Where the loss before training comes from."""
        steps = {result.reading.first[self.loss][0] for result in self.cells if self.loss in result.reading.first}
        if steps <= {0}:
            return f"{self.loss} of the untrained model"
        return f"first {self.loss} in the log, at step {max(steps)}: the model had been trained that long"

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """The metric, then the other held-out measurements of any run."""
        keys = dict.fromkeys(key for result in self.cells for key in result.reading.last)
        return tuple(dict.fromkeys([self.metric, *(key for key in keys if key.startswith(("eval/", "test/")))]))

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """The combinations of all that is varied but the rate, in the order given; the first is the baseline."""
        at = [index for index, factor in enumerate(self.grid.factors) if factor.key != RATE]
        grouped: dict[tuple[Choice, ...], dict[tuple[Choice, ...], list[CellResult]]] = {}
        for result in self.cells:
            key = tuple(result.cell.choices[index] for index in at)
            grouped.setdefault(key, {}).setdefault(result.cell.choices, []).append(result)
        rates = self.grid.rates
        numbers = tuple(choice.number or math.nan for choice in rates.choices) if rates else ()
        return tuple(
            Variant(key, tuple(Row(choices, tuple(found)) for choices, found in rows.items()), numbers,
                    self.loss, self.tolerance)
            for key, rows in grouped.items()
        )  # fmt: skip

    @property
    def rows(self) -> list[Row]:
        """Every combination of values, variant by variant."""
        return [row for variant in self.variants for row in variant.rows]

    @cached_property
    def differences(self) -> list[Difference]:
        """Every variant against the first: rate by rate, and each at its own best rate."""
        first, *others = self.variants
        rates = self.grid.rates
        out = []
        for other in others:
            for index, (row, base) in enumerate(zip(other.rows, first.rows, strict=True)):
                rate = rates.choices[index] if rates else None
                out.append(Difference(other.name, rate, False, self._paired(row, base)))
            if rates and other.best is not None and first.best is not None:
                found = self._paired(other.rows[other.best], first.rows[first.best])
                out.append(Difference(other.name, None, True, found))
        return out

    def _paired(self, row: Row, base: Row) -> Interval | None:
        values = {result.cell.seed: result.value(self.metric) for result in base.results if result.state == "finished"}
        pairs = [
            (result.value(self.metric), values.get(result.cell.seed))
            for result in row.results
            if result.state == "finished"
        ]
        return interval([one - other for one, other in pairs if one is not None and other is not None])

    def counts(self) -> Mapping[State, int]:
        """How many cells are in which state."""
        found: dict[State, int] = {}
        for result in self.cells:
            found[result.state] = found.get(result.state, 0) + 1
        return found


def read_results(folder: Path, grid: Grid, *, metric: str = LOSS, tolerance: float = USABLE) -> Results:
    """What the runs of a comparison say.

    Raises:
        ConfigError: Runs have finished and none of them measured the metric.
        RecordError: A log is damaged.
    """
    cells = tuple(CellResult(cell, read_cell(folder / cell.name)) for cell in grid.cells)
    results = Results(folder, grid, metric, tolerance, cells)
    finished = [result for result in cells if result.state == "finished"]
    if finished and not any(metric in result.reading.last for result in finished):
        known = _measured(finished)
        raise ConfigError(f"no run measured {metric}; --metric can be {', '.join(known)}")
    return results


def _measured(results: Sequence[CellResult]) -> list[str]:
    keys = dict.fromkeys(key for result in results for key in result.reading.last)
    return [key for key in keys if key.startswith(("eval/", "test/", "train/"))]
