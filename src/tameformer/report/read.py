"""A run folder as arrays: what the charts and the verdict look at, whatever state the run was left in."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tameformer.errors import RecordError
from tameformer.record import CONFIG, ENVIRONMENT, EVENTS, FIGURES, PROBES, RunReader

Read = TypeVar("Read")
_NUMBERS = re.compile(r"[0-9]{1,18}")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Series:
    """One measurement over the steps of a run, steps ascending and distinct; non-finite values stay in."""

    steps: np.ndarray
    """Optimizer steps, int64, shape (points,)."""
    values: np.ndarray
    """The measurement, float64, shape (points,)."""

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def finite(self) -> "Series":
        """The points whose value is finite."""
        keep = np.isfinite(self.values)
        return Series(self.steps[keep], self.values[keep])

    @cached_property
    def non_finite_steps(self) -> np.ndarray:
        """The steps whose value is NaN or infinite."""
        return self.steps[~np.isfinite(self.values)]


@dataclass(frozen=True)
class Event:
    """Something that happened at a step, in a plain sentence."""

    step: int
    kind: str
    message: str
    details: dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """One probed quantity of every layer, or of every head of every layer, over the steps it was measured at."""

    name: str
    rows: tuple[tuple[str, int | None], ...]
    """Layer and head (None for a value of the whole layer), layers in `model_order`, heads ascending."""
    steps: np.ndarray
    """int64, shape (steps,), ascending and distinct."""
    values: np.ndarray
    """float64, shape (rows, steps); NaN also where nothing was measured."""
    measured: np.ndarray
    """bool, shape (rows, steps)."""

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """The layers, each once."""
        return tuple(dict.fromkeys(layer for layer, _ in self.rows))

    def series(self, row: int) -> Series:
        """The measured points of one row."""
        keep = self.measured[row]
        return Series(self.steps[keep], self.values[row, keep])


@dataclass(frozen=True)
class Run:
    """All that a run folder says."""

    name: str
    log: dict[str, Series]
    probes: dict[str, Probe]
    events: tuple[Event, ...]
    environment: dict[str, Any]
    config_text: str
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the recipe wants to be seen, by name: see `tameformer.record.write_figure`."""
    remarks: tuple[str, ...] = ()
    """What could not be read, and why, a sentence each."""

    @cached_property
    def last_step(self) -> int:
        """The last step that anything was logged, probed or reported for; 0 when nothing was."""
        steps = [series.steps[-1] for series in self.log.values() if len(series)]
        steps += [probe.steps[-1] for probe in self.probes.values() if len(probe.steps)]
        return int(max(steps + [event.step for event in self.events], default=0))

    def ceiling(self, probe: Probe) -> np.ndarray | None:
        """The largest value each entry of `probe` can take, shape (rows, steps); None when the run does not say.

        Written by probes as `diag/<probe>_max/<layer>`.
        """
        return self.companion(probe, f"{probe.name}_max")

    def companion(self, probe: Probe, name: str) -> np.ndarray | None:
        """Another probe's values in the places of `probe`, shape (rows, steps); None when the run has not measured it.

        A row without heads stands for all heads of its layer; the last value known at a step counts, NaN before the
        first.
        """
        other = self.probes.get(name)
        if other is None:
            return None
        index = {row: number for number, row in enumerate(other.rows)}
        values = np.full(probe.values.shape, np.nan)
        for row, (layer, head) in enumerate(probe.rows):
            source = index.get((layer, head), index.get((layer, None)))
            known = other.series(source).finite if source is not None else None
            if known is not None and len(known):
                at = np.searchsorted(known.steps, probe.steps, side="right") - 1
                values[row] = np.where(at >= 0, known.values[np.maximum(at, 0)], np.nan)
        return values

    def drawn_probes(self) -> list[Probe]:
        """The probes that deserve a chart: all but those that are only another one's ceiling or lower bound."""
        names = self.probes.keys()
        return [
            probe
            for name, probe in self.probes.items()
            if not any(name.endswith(end) and name.removesuffix(end) in names for end in ("_max", "_bound"))
        ]


def read_run(folder: Path) -> Run:
    """The run in `folder`, finished or not; a part that cannot be read becomes a remark, except the log.

    Raises:
        RecordError: The folder holds no run, or its log is damaged before its last line.
    """
    reader = RunReader(folder)
    remarks: list[str] = []

    def tolerant(name: str, read: Callable[[], Read], empty: Read) -> Read:
        try:
            return read()
        except (RecordError, ValueError, OSError) as error:
            remarks.append(clean(f"{name} could not be read and is left out ({error})"))
            return empty

    lines = reader.log()
    probes = tolerant(PROBES, reader.probes, [])
    events = tolerant(EVENTS, reader.events, [])
    figures = tolerant(FIGURES, reader.figures, {})
    environment = tolerant(ENVIRONMENT, reader.environment, {})
    return Run(
        name=clean(folder.resolve().name),
        log=gather_series(lines),
        probes=gather_probes(probes),
        events=tuple(_event(record) for record in events if _is_step(record.get("step"))),
        environment=environment if isinstance(environment, dict) else {},
        config_text=clean(tolerant(CONFIG, reader.config_text, "")),
        figures=figures,
        remarks=tuple(remarks),
    )


def clean(text: object) -> str:
    """The text without the characters that HTML and XML cannot hold, each replaced by U+FFFD.

    Example:
        >>> clean("a" + chr(0) + "b")
        'a\ufffdb'
    """
    return _UNPRINTABLE.sub("\ufffd", str(text))


def gather_series(lines: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """The numbers of log lines by key, in the order first seen; of a step told twice the last telling counts.

    Example:
        >>> gather_series([{"step": 0, "train/loss": 2.0}, {"step": 5, "train/loss": 1.0}])["train/loss"].values
        array([2., 1.])
    """
    points: dict[str, dict[int, float]] = {}
    for line in lines:
        if not _is_step(line.get("step")):
            continue
        step = int(line["step"])
        for key, value in line.items():
            if key != "step" and _is_number(value):
                points.setdefault(clean(key), {})[step] = float(value)
    return {key: _series(values) for key, values in points.items()}


def gather_probes(lines: Iterable[dict[str, Any]]) -> dict[str, Probe]:
    """The `diag/<probe>/<layer>[/<head>]` values by probe; other keys are no probes."""
    parsed: dict[str, tuple[str, str, int | None] | None] = {}
    cells: dict[str, dict[tuple[str, int | None], dict[int, float]]] = {}
    for line in lines:
        if not _is_step(line.get("step")):
            continue
        step = int(line["step"])
        for key, value in line.items():
            if key not in parsed:
                parsed[key] = parse_probe_key(key)
            place = parsed[key]
            if place is not None and _is_number(value):
                cells.setdefault(place[0], {}).setdefault(place[1:], {})[step] = float(value)
    return {name: _probe(name, rows) for name, rows in cells.items()}


def parse_probe_key(key: str) -> tuple[str, str, int | None] | None:
    """Probe, layer and head of a key; None for a key of another kind.

    Example:
        >>> parse_probe_key("diag/attention_entropy/blocks.3/11"), parse_probe_key("diag/weight_norm/head")
        (('attention_entropy', 'blocks.3', 11), ('weight_norm', 'head', None))
    """
    parts = clean(key).split("/")
    if len(parts) < 3 or parts[0] != "diag":
        return None
    has_head = len(parts) > 3 and parts[-1].isascii() and parts[-1].isdigit() and len(parts[-1]) < 10
    return parts[1], "/".join(parts[2 : -1 if has_head else None]), int(parts[-1]) if has_head else None


def share_of(probe: Probe, ceiling: np.ndarray) -> Probe:
    """The probe as share of its largest possible value, shape (rows, steps); not measured where there is none."""
    measured = probe.measured & ((ceiling > 0) | ~np.isfinite(probe.values))
    return replace(probe, values=probe.values / np.where(ceiling > 0, ceiling, np.nan), measured=measured)


def model_order(layers: Iterable[str]) -> list[str]:
    """The layers, each once, in the order first seen, where those that differ in their numbers only count upwards.

    Example:
        >>> model_order(["embed", "blocks.10", "blocks.2", "head", "blocks.2"])
        ['embed', 'blocks.2', 'blocks.10', 'head']
    """
    found = list(dict.fromkeys(layers))
    families: dict[str, list[str]] = {}
    for layer in found:
        families.setdefault(_NUMBERS.sub("#", layer), []).append(layer)
    counted = {
        family: iter(sorted(members, key=lambda layer: [int(text) for text in _NUMBERS.findall(layer)]))
        for family, members in families.items()
    }
    return [next(counted[_NUMBERS.sub("#", layer)]) for layer in found]


def _is_number(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**1000  # a larger one overflows a float
    return isinstance(value, float)


def _is_step(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and 0 <= value < 2**53


def _series(points: dict[int, float]) -> Series:
    steps = np.array(sorted(points), dtype=np.int64)
    return Series(steps, np.array([points[step] for step in steps.tolist()], dtype=np.float64))


def _probe(name: str, cells: dict[tuple[str, int | None], dict[int, float]]) -> Probe:
    order = {layer: number for number, layer in enumerate(model_order([layer for layer, _ in cells]))}
    rows = sorted(cells, key=lambda row: (order[row[0]], -1 if row[1] is None else row[1]))
    steps = np.array(sorted({step for points in cells.values() for step in points}), dtype=np.int64)
    column = {step: number for number, step in enumerate(steps.tolist())}
    values = np.full((len(rows), len(steps)), np.nan)
    measured = np.zeros(values.shape, dtype=bool)
    for number, row in enumerate(rows):
        at = [column[step] for step in cells[row]]
        values[number, at] = list(cells[row].values())
        measured[number, at] = True
    return Probe(name, tuple(rows), steps, values, measured)


def _event(record: dict[str, Any]) -> Event:
    details = {key: value for key, value in record.items() if key not in ("step", "kind", "message")}
    return Event(int(record["step"]), clean(record.get("kind", "event")), clean(record.get("message", "")), details)
