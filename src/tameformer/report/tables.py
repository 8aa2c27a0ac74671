"""The tables of the report: evaluations, heads, events and environment as rows of text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tameformer.report.quantities import quantity_of
from tameformer.report.read import Event, Probe, Run, clean
from tameformer.report.wording import label, number, quantity

LONG_TABLE, LONGEST_TABLE = 24, 400  # rows above which a table starts folded, and above which its middle is left out


@dataclass(frozen=True)
class Table:
    """A heading, the columns' names, and rows of text; the first cell of a row names it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    note: str = ""


def evaluation_table(run: Run) -> list[Table]:
    """All evaluation and test results, a row a step."""
    keys = [key for key in run.log if key.startswith(("eval/", "test/"))]
    steps = sorted({int(step) for key in keys for step in run.log[key].steps})
    if not steps:
        return []
    found = {key: dict(zip(run.log[key].steps.tolist(), run.log[key].values.tolist(), strict=True)) for key in keys}
    rows = [
        (f"{step:,}", *(quantity(key, found[key][step]) if step in found[key] else "" for key in keys))
        for step in steps
    ]
    return [Table(f"Evaluations ({len(rows):,})", ("step", *map(label, keys)), abridged(rows), folded=True)]


def lowest_heads(run: Run, count: int = 10) -> list[Table]:
    """The heads whose attention entropy was lowest when last measured, as numbers beside the heat map's colours."""
    probe = run.probes.get("attention_entropy")
    ceilings = run.ceiling(probe) if probe is not None else None
    if probe is None:
        return []
    found = []
    for row, (layer, head) in enumerate(probe.rows):
        known = np.flatnonzero(np.isfinite(probe.values[row]))
        if len(known):
            at, ceiling = known[-1], np.nan if ceilings is None else ceilings[row, known[-1]]
            value = float(probe.values[row, at])
            found.append((value / ceiling if ceiling > 0 else value, layer, head, value, int(probe.steps[at])))
    rows = tuple(
        (
            layer,
            "" if head is None else str(head),
            number(value),
            f"{100 * rank:.1f} %" if ceilings is not None else "",
            f"{step:,}",
        )
        for rank, layer, head, value, step in sorted(found, key=lambda it: it[0])[:count]
    )
    title = f"Lowest attention entropy when last measured ({len(rows)} of {len(found):,} heads)"
    return [Table(title, ("layer", "head", "nats", "share of ceiling", "step"), rows, folded=True)] if rows else []


def worst_places(probes: Sequence[Probe], count: int = 3) -> list[Table]:
    """For each probe with a worrying end, the places nearest to it when last measured, with where they began."""
    rows = []
    for probe in probes:
        known = quantity_of(probe.name)
        if known.worry is None or probe.name == "attention_entropy":  # which has a table of its own
            continue
        ends = []
        for row, (layer, head) in enumerate(probe.rows):
            series = probe.series(row)
            if len(series):
                last = float(series.values[-1])
                bad = np.inf if not np.isfinite(last) else -last if known.worry == "low" else last
                ends.append((bad, layer, "" if head is None else str(head), series))
        for _, layer, head, series in sorted(ends, key=lambda end: -end[0])[:count]:
            last, first = float(series.values[-1]), float(series.values[0])
            step = f"{int(series.steps[-1]):,}"
            rows.append((f"{known.title}, {known.worry}", layer, head, number(last), step, number(first)))
    columns = ("quantity", "layer", "head", "last", "at step", "first")
    title = f"Most worrying when last measured (up to {count} places of each)"
    return [Table(title, columns, tuple(rows), folded=True)] if rows else []


def event_tables(run: Run) -> tuple[Table, ...]:
    """What happened, folded when long."""
    rows = abridged(_event_rows(run.events))
    return (Table("What happened", ("step", "kind", "message"), rows, folded=len(rows) > LONG_TABLE),) if rows else ()


def environment_tables(run: Run) -> list[Table]:
    """What the run ran on, as dotted names."""
    rows = []
    for key, value in run.environment.items():
        for name, text in flatten({key: value}):
            rows.append((clean(name), clean(text)))
    return [Table("Environment", ("what", "value"), tuple(rows), folded=True)] if rows else []


def flatten(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as dotted names and texts; the command line is joined by spaces.

    Example:
        >>> flatten({"git": {"commit": "ab1", "dirty": False}, "command": ["tame", "train"]})
        [('git.commit', 'ab1'), ('git.dirty', 'no'), ('command', 'tame train')]
    """
    if isinstance(tree, dict):
        return [
            pair for key, value in tree.items() for pair in flatten(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(tree, bool):
        return [(prefix, "yes" if tree else "no")]
    if isinstance(tree, list):
        simple = all(isinstance(item, str | int | float) for item in tree)
        return [(prefix, " ".join(map(str, tree)) if simple else json.dumps(tree, default=str))]
    return [(prefix, "none" if tree is None else str(tree))]


def abridged(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The rows, or the first and the last of very many with a row between that says how many are not shown."""
    if len(rows) <= LONGEST_TABLE:
        return tuple(rows)
    half = LONGEST_TABLE // 2
    gap = ("\u2026", f"{len(rows) - 2 * half:,} rows are left out here", *[""] * (len(rows[0]) - 2))
    return (*rows[:half], gap, *rows[-half:])


def _event_rows(events: Sequence[Event]) -> list[tuple[str, ...]]:
    """One row an event; a stretch of more than three of a kind keeps its first and last."""
    rows: list[tuple[str, ...]] = []
    start = 0
    while start < len(events):
        stop = start
        while stop < len(events) and events[stop].kind == events[start].kind:
            stop += 1
        run, kind = events[start:stop], events[start].kind.replace("_", " ")
        if len(run) > 3:
            between = ("\u2026", kind, f"{len(run) - 2:,} more between these two")
            rows += [_event_row(run[0]), between, _event_row(run[-1])]
        else:
            rows += map(_event_row, run)
        start = stop
    return rows


def _event_row(event: Event) -> tuple[str, ...]:
    return f"{event.step:,}", event.kind.replace("_", " "), event.message
