"""The report: what a run folder says, put in order for a reader, as one HTML file that needs nothing beside it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from tameformer.record import LOG, REPORT, write_atomically
from tameformer.report import charts
from tameformer.report.charts import Chart, Line
from tameformer.report.read import Event, Run, Series, clean, read_run
from tameformer.report.verdict import Verdict, best, direction, judge, label, number, quantity, smoothed

LONG_TABLE, LONGEST_TABLE = 24, 400  # rows above which a table starts folded, and above which its middle is left out
_UNDRAWN = ("epoch", "perf/elapsed_seconds", "perf/step_seconds", "train/clip_rate")
_SHOWN_FIRST = ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/samples_per_second")


@dataclass(frozen=True)
class Table:
    """A heading, the columns' names, and rows of text; the first cell of a row names it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    folded: bool = False
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page: charts, then tables, then preformatted texts by heading, folded."""

    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()


@np.errstate(over="ignore", invalid="ignore")  # an exploding loss may be near the largest float
def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, to `out`, by default `report.html` in the run folder; returns its path.

    Raises:
        RecordError: The folder holds no run, or its log is damaged before its last line.
    """
    run = read_run(folder)
    verdict = judge(run)
    html = _render(
        title=run.name,
        kind="Training report",
        state=verdict.state,
        level=verdict.level,
        headline=verdict.headline,
        findings=verdict.findings,
        numbers=key_numbers(run, verdict),
        remarks=run.remarks,
        lead=(),
        keys=(),
        sections=[section for section in _sections(run) if section.charts or section.tables or section.texts],
    )
    path = folder / REPORT if out is None else out
    write_atomically(path, html)
    return path


@np.errstate(over="ignore", invalid="ignore")
def write_comparison(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page about several runs to `out`, by default `comparison.html` here, and return its path.

    Curves of the same key share a figure; results and differing settings stand side by side.

    Raises:
        RecordError: One of the folders holds no run.
        ValueError: No folder was given.
    """
    if not folders:
        raise ValueError("a comparison needs at least one run folder, got none; name the runs to compare")
    runs = [read_run(folder) for folder in folders]
    names = _distinct_names(folders, runs)
    verdicts = [judge(run) for run in runs]
    html = _render(
        title=f"{len(runs)} runs compared",
        kind="Comparison",
        state="",
        level="note",
        headline="",
        findings=(),
        numbers=(),
        remarks=[f"{name}: {remark}" for name, run in zip(names, runs, strict=True) for remark in run.remarks],
        lead=_comparison_tables(names, runs, verdicts),
        keys=[(name, *_run_look(index)) for index, name in enumerate(names)],
        sections=[section for section in _comparison_sections(names, runs) if section.charts or section.tables],
    )
    path = Path("comparison.html") if out is None else out
    write_atomically(path, html)
    return path


def key_numbers(run: Run, verdict: Verdict) -> list[tuple[str, str, str]]:
    """The handful of numbers to see first: heading, value, and what to know about it."""
    log, out = run.log, [("Last step", f"{run.last_step:,}", verdict.state)]
    loss = log.get("train/loss")
    if loss is not None and len(loss.finite):
        out.append(("Training loss", number(smoothed(loss.finite).values[-1]), "smoothed, last"))
    elif loss is not None:
        out.append(("Training loss", "NaN", "never finite"))
    for key in _metrics(log)[:1]:
        top = best(key, log[key])
        if top is not None:
            out.append(
                (f"Best {label(key).lower().replace('bleu', 'BLEU')}", quantity(key, top[1]), f"step {top[0]:,}")
            )
    for key in [key for key in log if key.startswith("test/") and key != "test/loss"][:2]:
        if len(log[key].finite):
            out.append((label(key), quantity(key, log[key].finite.values[-1]), f"step {log[key].finite.steps[-1]:,}"))
    if (key := _throughput_key(log)) is not None:
        out.append((_per_second(key), number(float(np.median(log[key].finite.values))), "median"))
    if (seconds := elapsed_seconds(log.get("perf/elapsed_seconds"))) is not None:
        out.append(("Time", duration(seconds), "training and evaluation"))
    return out


def elapsed_seconds(series: Series | None) -> float | None:
    """Seconds over all starts of a run: where the clock went back, a resumed run began to count anew.

    Example:
        >>> elapsed_seconds(Series(np.array([1, 2, 3]), np.array([5.0, 9.0, 2.0])))
        11.0
    """
    if series is None or not len(series.finite):
        return None
    values = series.finite.values
    return float(values[-1] + values[:-1][np.diff(values) < 0].sum())


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    Example:
        >>> duration(7.25), duration(125.0), duration(7300.0)
        ('7.2 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _sections(run: Run) -> list[Section]:
    last = run.last_step
    training = [chart for key in _SHOWN_FIRST[:3] for chart in _named_chart(run, key)]
    metrics = [_metric_chart(run, key) for key in _metrics(run.log) if key != "eval/loss"]
    if "train/loss" not in run.log and "eval/loss" in run.log:
        metrics.insert(0, _metric_chart(run, "eval/loss"))
    speed = [chart for key in _SHOWN_FIRST[3:] if key == _throughput_key(run.log) for chart in _named_chart(run, key)]
    other = [
        charts.line_chart(_heading(key), [Line("", series)], last_step=last)
        for key, series in run.log.items()
        if key not in (*_UNDRAWN, *_SHOWN_FIRST) and not key.startswith(("eval/", "test/"))
    ]  # fmt: skip
    probes = [_entropy_chart(run) if probe.name == "attention_entropy" else charts.probe_chart(probe, last_step=last)
              for probe in run.drawn_probes() if len(probe.steps)]  # fmt: skip
    main = [*training[:1], *metrics, *training[1:], *speed, *other]
    return [
        Section("Training", tuple(main), tuple(_evaluation_table(run))),
        Section("Inside the model", tuple(probes), tuple(_lowest_heads(run))),
        Section("Events", (charts.event_chart(run.events, last_step=last),) if run.events else (), _event_tables(run)),
        Section("How it was run", (), tuple(_environment_tables(run)), _texts(run)),
    ]


def _named_chart(run: Run, key: str) -> list[Chart]:
    """The chart of one of the series that every run has; empty when this one has not."""
    series, last = run.log.get(key), run.last_step
    if series is None:
        return []
    if key == "train/loss":
        smooth = smoothed(series.finite)
        lines = [Line("training" if len(smooth) < 12 else "training, each record", series, look="faint")]
        if len(smooth) >= 12:
            lines.append(Line("training, smoothed", smooth))
        lines += _evaluation_lines(run, "eval/loss", charts.VERMILION)
        return [charts.line_chart("Loss", lines, last_step=last)]
    if key == "train/grad_norm":
        rate = run.log.get("train/clip_rate")
        lower = None if rate is None else Line("share of steps clipped", rate, charts.PURPLE)
        lines = [Line("norm before clipping", series)]
        return [charts.line_chart("Gradient norm", lines, last_step=last, log=True, lower=lower)]
    if key == "train/lr":
        return [charts.line_chart("Learning rate", [Line("", series)], last_step=last, log=False)]
    lines = [Line("", series, look="faint" if len(series.finite) >= 12 else "line")]
    if len(series.finite) >= 12:
        lines = [Line("each record", series, look="faint"), Line("smoothed", smoothed(series.finite))]
    return [charts.line_chart(f"Throughput, {_per_second(key).lower()}", lines, last_step=last, log=False)]


def _heading(key: str) -> str:
    return "Attention entropy, mean over heads, nats" if key == "train/attention_entropy" else label(key)


def _metric_chart(run: Run, key: str) -> Chart:
    train = run.log.get(key.replace("eval/", "train/", 1))
    lines = [Line("training", train, look="faint")] if train is not None else []
    lines += _evaluation_lines(run, key, charts.BLUE)
    way = {"higher": "Higher is better.", "lower": "Lower is better.", None: ""}[direction(key)]
    return charts.line_chart(label(key), lines, last_step=run.last_step, percent=key.endswith("accuracy"), caption=way)


def _evaluation_lines(run: Run, key: str, color: str) -> list[Line]:
    lines = []
    if key in run.log:
        lines.append(Line("evaluation", run.log[key], color, "point"))
        top = best(key, run.log[key])
        if top is not None and len(run.log[key].finite) > 1:
            ring = Series(np.array([top[0]]), np.array([top[1]]))
            lines.append(Line(f"best, {quantity(key, top[1])}", ring, color, "ring"))
    test = run.log.get(key.replace("eval/", "test/", 1))
    if test is not None:
        lines.append(Line("test", test, charts.GREEN, "diamond"))
    return lines


def _entropy_chart(run: Run) -> Chart:
    probe = run.probes["attention_entropy"]
    ceiling = run.ceiling(probe)
    if ceiling is None:
        return charts.heat_map(
            "Attention entropy, nats", probe, last_step=run.last_step, keep="lowest",
            caption="Low values mean attention on few keys.",
        )  # fmt: skip
    return charts.heat_map(
        "Attention entropy, share of its ceiling", probe, last_step=run.last_step, ceiling=ceiling, keep="lowest",
        caption="The ceiling is the logarithm of the number of visible keys: 100 % is attention spread evenly, "
        "near 0 % it rests on one key.",
    )  # fmt: skip


def _lowest_heads(run: Run, count: int = 10) -> list[Table]:
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


def _evaluation_table(run: Run) -> list[Table]:
    keys = [key for key in run.log if key.startswith(("eval/", "test/"))]
    steps = sorted({int(step) for key in keys for step in run.log[key].steps})
    if not steps:
        return []
    found = {key: dict(zip(run.log[key].steps.tolist(), run.log[key].values.tolist(), strict=True)) for key in keys}
    rows = [
        (f"{step:,}", *(quantity(key, found[key][step]) if step in found[key] else "" for key in keys))
        for step in steps
    ]
    return [Table(f"Evaluations ({len(rows):,})", ("step", *map(label, keys)), _abridged(rows), folded=True)]


def _abridged(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """The rows, or the first and the last of very many with a row between that says how many are not shown."""
    if len(rows) <= LONGEST_TABLE:
        return tuple(rows)
    half = LONGEST_TABLE // 2
    gap = ("\u2026", f"{len(rows) - 2 * half:,} rows are left out here", *[""] * (len(rows[0]) - 2))
    return (*rows[:half], gap, *rows[-half:])


def _event_tables(run: Run) -> tuple[Table, ...]:
    rows = _abridged(_event_rows(run.events))
    return (Table("What happened", ("step", "kind", "message"), rows, folded=len(rows) > LONG_TABLE),) if rows else ()


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


def _environment_tables(run: Run) -> list[Table]:
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


def _texts(run: Run) -> tuple[tuple[str, str], ...]:
    return (("Configuration", run.config_text),) if run.config_text.strip() else ()


def _comparison_tables(names: Sequence[str], runs: Sequence[Run], verdicts: Sequence[Verdict]) -> tuple[Table, ...]:
    keys = list(dict.fromkeys(key for run in runs for key in run.log if key.startswith(("eval/", "test/"))))
    rows = [
        ("State", *(verdict.headline for verdict in verdicts)),
        ("Training loss, smoothed, last", *(_last_loss(run) for run in runs)),
        *((f"{label(key)}{', best' * (direction(key) is not None and key.startswith('eval/'))}",
           *(_summary(key, run.log.get(key)) for run in runs)) for key in keys),
        ("Throughput, median", *(_speed(run) for run in runs)),
        ("Time", *(_time(run) for run in runs)),
    ]  # fmt: skip
    tables = [Table("Side by side", ("", *names), tuple(row for row in rows if any(cell for cell in row[1:])))]
    worst = [
        (name, finding.text)
        for name, verdict in zip(names, verdicts, strict=True)
        for finding in verdict.findings
        if finding.level != "good"
    ]
    if worst:
        tables.append(Table("What stands out", ("run", "finding"), tuple(worst)))
    if differing := config_differences(runs):
        tables.append(Table("Configuration, where the runs differ", ("", *names), tuple(differing)))
    return tuple(tables)


def config_differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Setting and its value in each run, for the settings that are not the same in all."""
    settings = [dict(flatten(_parse(run.config_text))) for run in runs]
    keys = dict.fromkeys(key for setting in settings for key in setting)
    rows = [(clean(key), *(clean(setting.get(key, "\u2013")) for setting in settings)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _parse(text: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}  # shown as text in the run's own report
    return tree if isinstance(tree, dict) else {}


def _comparison_sections(names: Sequence[str], runs: Sequence[Run]) -> list[Section]:
    last = max(run.last_step for run in runs)
    keys = list(dict.fromkeys(key for run in runs for key in run.log if not key.startswith("test/")))
    order = ["train/loss", "eval/loss", *(key for key in keys if key.startswith("eval/")), *_SHOWN_FIRST]
    drawn = [key for key in dict.fromkeys([*order, *keys]) if key in keys and key not in _UNDRAWN]
    return [Section("Curves", tuple(_overlay(key, names, runs, last) for key in drawn))]


def _overlay(key: str, names: Sequence[str], runs: Sequence[Run], last: int) -> Chart:
    lines, smoothing, percent = [], False, key.endswith("accuracy")
    for index, run in enumerate(runs):
        if key not in run.log:
            continue
        series, (color, look) = run.log[key], _run_look(index)
        if key.startswith(("train/loss", "train/grad_norm", "perf/")) and len(series.finite) >= 12:
            smoothing = True
            lines.append(Line("", series, color, "faint"))
            lines.append(Line("", smoothed(series.finite), color, look))
        else:
            few = {"marker": "o"} if key.startswith("eval/") and len(series) < 60 else {}
            lines.append(Line("", series, color, look, few))
    caption = "Thick: smoothed; faint: each record." if smoothing else ""
    log = True if key == "train/grad_norm" else False if key == "train/lr" else None
    return charts.line_chart(_heading(key), lines, last_step=last, log=log, percent=percent, caption=caption)


def _run_look(index: int) -> tuple[str, Any]:
    looks = ("line", "dashed", "dotted")
    return charts.PALETTE[index % len(charts.PALETTE)], looks[index // len(charts.PALETTE) % len(looks)]


def _distinct_names(folders: Sequence[Path], runs: Sequence[Run]) -> list[str]:
    """The runs' names, with the parent folder before those that are the same, and a number where even that is."""
    names = [run.name for run in runs]
    names = [
        clean(f"{folder.resolve().parent.name}/{name}") if names.count(name) > 1 else name
        for folder, name in zip(folders, names, strict=True)
    ]
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def _last_loss(run: Run) -> str:
    loss = run.log.get("train/loss")
    return number(smoothed(loss.finite).values[-1]) if loss is not None and len(loss.finite) else ""


def _summary(key: str, series: Series | None) -> str:
    if series is None or not len(series.finite):
        return "" if series is None else "NaN"
    top = best(key, series)
    if top is None or key.startswith("test/"):
        return quantity(key, series.finite.values[-1])
    return f"{quantity(key, top[1])} at step {top[0]:,}"


def _speed(run: Run) -> str:
    key = _throughput_key(run.log)
    return "" if key is None else f"{number(float(np.median(run.log[key].finite.values)))} {_per_second(key).lower()}"


def _time(run: Run) -> str:
    seconds = elapsed_seconds(run.log.get("perf/elapsed_seconds"))
    return "" if seconds is None else duration(seconds)


def _metrics(log: dict[str, Series]) -> list[str]:
    """The evaluation metrics, the one that people care for first."""
    order = ("accuracy", "bleu", "perplexity", "loss")
    keys = [key for key in log if key.startswith("eval/")]
    return sorted(keys, key=lambda key: order.index(key[5:]) if key[5:] in order else len(order))


def _throughput_key(log: dict[str, Series]) -> str | None:
    keys = ("perf/tokens_per_second", "perf/samples_per_second")
    return next((key for key in keys if key in log and len(log[key].finite)), None)


def _per_second(key: str) -> str:
    return "Tokens/s" if "tokens" in key else "Samples/s"


def _render(**content: Any) -> str:
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = lambda chart: Markup(
        chart.svg
    )  # serialised from a parsed tree, so escaped already
    return environment.from_string(template).render(**content, log_name=LOG)
