"""The parts of the page about one run: which figures and tables there are, and in which order."""

from dataclasses import dataclass

import numpy as np

from tameformer.report.curves import Line, Mark, event_chart, line_chart
from tameformer.report.drawing import BLUE, GREEN, INK, PURPLE, VERMILION, Chart
from tameformer.report.loss import smoothed
from tameformer.report.probe_figures import probe_figures
from tameformer.report.quantities import GROUPS, QUANTITIES, quantity_of
from tameformer.report.read import Run, Series
from tameformer.report.tables import (
    Table,
    environment_tables,
    evaluation_table,
    event_tables,
    lowest_heads,
    worst_places,
)
from tameformer.report.task_figures import Passage, task_figures
from tameformer.report.trouble import Trouble, first_trouble
from tameformer.report.verdict import best
from tameformer.report.wording import direction, is_share, label, quantity

UNDRAWN = (
    "epoch", "perf/elapsed_seconds", "perf/step_seconds", "perf/data_wait", "train/clip_rate", "train/grad_norm_max",
    "train/skipped",  # the events tell of each
)  # fmt: skip
SHOWN_FIRST = ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second", "perf/samples_per_second")


@dataclass(frozen=True)
class Section:
    """A part of the page: charts, then tables, then preformatted texts by heading, folded."""

    title: str
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    texts: tuple[tuple[str, str], ...] = ()
    passages: tuple[Passage, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing in it."""
        return not (self.charts or self.tables or self.texts or self.passages)


def sections(run: Run) -> list[Section]:
    """The parts of a run's page in reading order; some may be empty."""
    last, trouble = run.last_step, first_trouble(run)
    training = [chart for key in SHOWN_FIRST[:3] for chart in _named_chart(run, key, trouble)]
    metric_charts = [_metric_chart(run, key) for key in metrics(run.log) if key != "eval/loss"]
    if "train/loss" not in run.log and "eval/loss" in run.log:
        metric_charts.insert(0, _metric_chart(run, "eval/loss"))
    speed = [
        chart for key in SHOWN_FIRST[3:] if key == throughput_key(run.log) for chart in _named_chart(run, key, trouble)
    ]
    other = [
        line_chart(heading(key), [Line("", series)], last_step=last)
        for key, series in run.log.items()
        if key not in (*UNDRAWN, *SHOWN_FIRST) and not key.startswith(("eval/", "test/"))
    ]  # fmt: skip
    main = [*training[:1], *metric_charts, *training[1:], *speed, *other]
    return [
        Section("Training", tuple(main), tuple(evaluation_table(run))),
        _task_section(run),
        *_probe_sections(run, trouble),
        Section("Events", (event_chart(run.events, last_step=last),) if run.events else (), event_tables(run)),
        Section("How it was run", (), tuple(environment_tables(run)), _texts(run)),
    ]


def _task_section(run: Run) -> Section:
    """What the recipe itself wants to be seen."""
    charts, shown, remarks = task_figures(run.figures)
    return Section("The task", charts, (), tuple((f"{name} cannot be drawn", why) for name, why in remarks), shown)


def _probe_sections(run: Run, trouble: Trouble | None) -> list[Section]:
    """A part for each group of probes: its figures, then its most worrying places as numbers."""
    drawn = [probe for probe in run.drawn_probes() if len(probe.steps)]
    known = list(QUANTITIES)
    drawn.sort(key=lambda probe: known.index(probe.name) if probe.name in QUANTITIES else len(known))
    parts = []
    for group in GROUPS:
        members = [probe for probe in drawn if quantity_of(probe.name).group == group]
        figures = tuple(chart for probe in members for chart in probe_figures(run, probe, trouble))
        tables = lowest_heads(run) if group == "Attention" else []
        parts.append(Section(group, figures, (*worst_places(members), *tables)))
    return parts


def _named_chart(run: Run, key: str, trouble: Trouble | None) -> list[Chart]:
    """The chart of one of the series that every run has; empty when this one has not."""
    series, last = run.log.get(key), run.last_step
    if series is None:
        return []
    if key == "train/loss":
        smooth = smoothed(series.finite)
        lines = [Line("training" if len(smooth) < 12 else "training, each record", series, look="faint")]
        if len(smooth) >= 12:
            lines.append(Line("training, smoothed", smooth))
        lines += evaluation_lines(run, "eval/loss", VERMILION)
        return [line_chart("Loss", lines, last_step=last, marks=trouble_marks(trouble))]
    if key == "train/grad_norm":
        rate = run.log.get("train/clip_rate")
        lower = None if rate is None else Line("share of steps clipped", rate, PURPLE)
        largest = run.log.get("train/grad_norm_max")
        lines = [] if largest is None else [Line("largest between two records", largest, look="faint")]
        lines.append(Line("mean before clipping", series))
        return [line_chart("Gradient norm", lines, last_step=last, log=True, lower=lower)]
    if key == "train/lr":
        return [line_chart("Learning rate", [Line("", series)], last_step=last, log=False)]
    lines = [Line("", series, look="faint" if len(series.finite) >= 12 else "line")]
    if len(series.finite) >= 12:
        lines = [Line("each record", series, look="faint"), Line("smoothed", smoothed(series.finite))]
    return [line_chart(f"Throughput, {per_second(key).lower()}", lines, last_step=last, log=False)]


def trouble_marks(trouble: Trouble | None) -> list[Mark]:
    """Where the trouble began, and where the loss went, as marks on the loss; none for a run in order."""
    if trouble is None:
        return []
    marks = [Mark(trouble.step, f"step {trouble.step:,}: {trouble.label}")]
    if trouble.loss is not None and trouble.loss.step != trouble.step:
        marks.append(Mark(trouble.loss.step, f"step {trouble.loss.step:,}: {trouble.loss.words}", INK, ":"))
    return marks


def heading(key: str) -> str:
    """The title of a logged key's chart."""
    return "Attention entropy, mean over heads, nats" if key == "train/attention_entropy" else label(key)


def _metric_chart(run: Run, key: str) -> Chart:
    train = run.log.get(key.replace("eval/", "train/", 1))
    lines = [Line("training", train, look="faint")] if train is not None else []
    lines += evaluation_lines(run, key, BLUE)
    way = {"higher": "Higher is better.", "lower": "Lower is better.", None: ""}[direction(key)]
    percent = is_share(key, float(max(np.abs(run.log[key].finite.values), default=0.0)))
    log = False if percent else None
    return line_chart(label(key), lines, last_step=run.last_step, log=log, percent=percent, caption=way)


def evaluation_lines(run: Run, key: str, color: str) -> list[Line]:
    """An evaluation metric over steps, a ring at its best point, and the test result."""
    lines = []
    if key in run.log:
        lines.append(Line("evaluation", run.log[key], color, "point"))
        top = best(key, run.log[key])
        if top is not None and len(run.log[key].finite) > 1:
            ring = Series(np.array([top[0]]), np.array([top[1]]))
            lines.append(Line(f"best, {quantity(key, top[1])}", ring, color, "ring"))
    test = run.log.get(key.replace("eval/", "test/", 1))
    if test is not None:
        lines.append(Line("test", test, GREEN, "diamond"))
    return lines


def _texts(run: Run) -> tuple[tuple[str, str], ...]:
    return (("Configuration", run.config_text),) if run.config_text.strip() else ()


def metrics(log: dict[str, Series]) -> list[str]:
    """The evaluation metrics, the one that people care for first."""
    order = ("accuracy", "bleu", "wer", "cer", "perplexity", "loss")
    keys = [key for key in log if key.startswith("eval/")]
    return sorted(keys, key=lambda key: order.index(key[5:]) if key[5:] in order else len(order))


def throughput_key(log: dict[str, Series]) -> str | None:
    """The key that tells the speed of the run: tokens before samples; None when neither was logged."""
    keys = ("perf/tokens_per_second", "perf/samples_per_second")
    return next((key for key in keys if key in log and len(log[key].finite)), None)


def per_second(key: str) -> str:
    """The unit of a throughput key."""
    return "Tokens/s" if "tokens" in key else "Samples/s"
