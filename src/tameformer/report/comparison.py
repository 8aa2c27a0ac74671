"""The page about several runs: results and differing settings side by side, curves of the same key in one figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tameformer.record import write_atomically
from tameformer.report.curves import Line, line_chart
from tameformer.report.drawing import PALETTE, Chart
from tameformer.report.loss import smoothed
from tameformer.report.page import duration, elapsed_seconds, render
from tameformer.report.read import Run, Series, clean, read_run
from tameformer.report.sections import SHOWN_FIRST, UNDRAWN, Section, heading, per_second, throughput_key
from tameformer.report.tables import Table, flatten
from tameformer.report.verdict import Verdict, best, judge
from tameformer.report.wording import direction, is_share, label, number, quantity


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
    html = render(
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
    order = ["train/loss", "eval/loss", *(key for key in keys if key.startswith("eval/")), *SHOWN_FIRST]
    drawn = [key for key in dict.fromkeys([*order, *keys]) if key in keys and key not in UNDRAWN]
    return [Section("Curves", tuple(_overlay(key, names, runs, last) for key in drawn))]


def _overlay(key: str, names: Sequence[str], runs: Sequence[Run], last: int) -> Chart:
    lines, smoothing = [], False
    values = [value for run in runs if key in run.log for value in run.log[key].finite.values]
    percent = is_share(key, max(map(abs, values), default=0.0))
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
    log = True if key == "train/grad_norm" else False if percent or key == "train/lr" else None
    return line_chart(heading(key), lines, last_step=last, log=log, percent=percent, caption=caption)


def _run_look(index: int) -> tuple[str, Any]:
    looks = ("line", "dashed", "dotted")
    return PALETTE[index % len(PALETTE)], looks[index // len(PALETTE) % len(looks)]


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
    key = throughput_key(run.log)
    return "" if key is None else f"{number(float(np.median(run.log[key].finite.values)))} {per_second(key).lower()}"


def _time(run: Run) -> str:
    seconds = elapsed_seconds(run.log.get("perf/elapsed_seconds"))
    return "" if seconds is None else duration(seconds)
