"""The report: what a run folder says, put in order for a reader, as one HTML file that needs nothing beside it."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from tameformer.record import LOG, REPORT, write_atomically
from tameformer.report.loss import smoothed
from tameformer.report.read import Run, Series, read_run
from tameformer.report.sections import metrics, per_second, sections, throughput_key
from tameformer.report.verdict import Verdict, best, judge
from tameformer.report.wording import label, number, quantity


@np.errstate(over="ignore", invalid="ignore")  # an exploding loss may be near the largest float
def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the page of a run, finished or not, to `out`, by default `report.html` in the run folder; returns its path.

    Raises:
        RecordError: The folder holds no run, or its log is damaged before its last line.
    """
    run = read_run(folder)
    verdict = judge(run)
    html = render(
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
        sections=[section for section in sections(run) if not section.is_empty],
    )
    path = folder / REPORT if out is None else out
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
    for key in metrics(log)[:1]:
        top = best(key, log[key])
        if top is not None:
            name = label(key)
            out.append((f"Best {name[:1].lower()}{name[1:]}", quantity(key, top[1]), f"step {top[0]:,}"))
    for key in [key for key in log if key.startswith("test/") and key != "test/loss"][:2]:
        if len(log[key].finite):
            out.append((label(key), quantity(key, log[key].finite.values[-1]), f"step {log[key].finite.steps[-1]:,}"))
    if (key := throughput_key(log)) is not None:
        out.append((per_second(key), number(float(np.median(log[key].finite.values))), "median"))
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


def render(**content: Any) -> str:
    """The page as HTML; everything but the drawings is escaped by the template."""
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = lambda chart: Markup(
        chart.svg
    )  # serialised from a parsed tree, so escaped already
    return environment.from_string(template).render(**content, log_name=LOG)
