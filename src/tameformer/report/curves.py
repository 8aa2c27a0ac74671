"""Figures over steps: lines of one or several series, and the time line of events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tameformer.report.axes import BUCKETS, OFF_SCALE, drawable, finish_axes, spread, thin, value_ticks, wants_log
from tameformer.report.drawing import BLUE, BROKEN, NARROW, WIDE, Chart, drawing
from tameformer.report.read import Event, Series
from tameformer.report.wording import shorten


@dataclass(frozen=True)
class Line:
    """One series of a line chart and how to draw it."""

    label: str
    series: Series
    color: str = BLUE
    look: Literal["line", "faint", "dashed", "dotted", "point", "ring", "diamond"] = "line"
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """A step to point at: a vertical line, with a few words beside it where they are given."""

    step: int
    text: str = ""
    color: str = BROKEN
    style: Literal["-", "--", ":"] = "--"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    last_step: int,
    log: bool | None = None,
    lower: Line | None = None,
    percent: bool = False,
    marks: Sequence[Mark] = (),
    caption: str = "",
) -> Chart:
    """Lines over steps, with non-finite values marked at the top edge; None for `log` decides by the values' range.

    Args:
        title: Heading, and the drawing's text alternative.
        lines: What to draw, the first at the back.
        last_step: End of the step axis, so that all charts of a page line up.
        log: Logarithmic axis.
        lower: A share between 0 and 1 for a second, flat panel below, such as a clip rate.
        percent: Print shares as per cent.
        marks: Steps to point at, the most important first.
        caption: What the reader must know beyond the legend.
    """
    notes = [caption] if caption else []
    values = np.concatenate([drawable(line.series).values for line in lines] or [np.zeros(0)])
    positive = values[values > 0]
    log = wants_log(values) if log is None else log
    log = log and len(np.unique(positive)) > 1
    with drawing(NARROW, 280) as (figure, save):
        panels = _panels(figure, NARROW, 280, two=lower is not None)
        axes = panels[0]
        thinned = False
        for line in lines:
            thinned |= _draw(axes, line, log=log)
        if log:
            axes.set_yscale("log")
            notes.append(
                "Logarithmic axis" + ("." if len(positive) == len(values) else "; values of 0 or below are not shown.")
            )
        finish_axes(axes, last_step)
        value_ticks(axes, positive if log else values, log=log, percent=percent)
        broken = _mark_broken(axes, lines)
        draw_marks(axes, marks, last_step)
        if lower is not None:
            thinned |= _draw_share(panels[1], lower, last_step)
            axes.tick_params(labelbottom=False)
        panels[-1].set_xlabel("step")
        if thinned:
            notes.append(f"Long series are drawn by the lowest and highest value of {BUCKETS} stretches.")
        svg = save(title)
    legend = [(line.label, line.color, line.look) for line in lines if line.label]
    if lower is not None:
        legend.append((lower.label, lower.color, "box"))
    if broken:
        legend.append((broken, BROKEN, "cross"))
    return Chart(title, svg, " ".join(notes), legend=tuple(legend))


def draw_marks(axes: Axes, marks: Sequence[Mark], last_step: int) -> None:
    """The marks as vertical lines from edge to edge, their words below each other at the top."""
    for row, mark in enumerate(marks):
        axes.axvline(mark.step, color=mark.color, linestyle=mark.style, linewidth=1.2, zorder=4)
        if mark.text:
            right = mark.step > 0.5 * last_step
            axes.annotate(
                shorten(mark.text, 46), (mark.step, 1), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                xytext=(-5 if right else 5, -4 - 14 * row), ha="right" if right else "left", va="top", fontsize=9,
                color=mark.color, zorder=5, bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
            )  # fmt: skip


def event_chart(events: Sequence[Event], *, last_step: int) -> Chart:
    """One row a kind of event, one mark an event, over steps."""
    kinds = list(dict.fromkeys(event.kind for event in events))
    shown = kinds[:12]
    height = 44 + 22 * len(shown)
    with drawing(WIDE, height) as (figure, save):
        left = 24 + min(170, int(6.4 * max((len(kind) for kind in shown), default=1)))
        axes = figure.add_axes((left / WIDE, 38 / height, (WIDE - left - 24) / WIDE, (height - 44) / height))
        for row, kind in enumerate(shown):
            steps = spread(np.unique([event.step for event in events if event.kind == kind]))
            color = BROKEN if _is_trouble(kind) else BLUE
            axes.plot(steps, np.full(len(steps), row), "X" if _is_trouble(kind) else "o", color=color, markersize=6)
        axes.set_yticks(range(len(shown)), [shorten(kind.replace("_", " "), 28) for kind in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        finish_axes(axes, last_step, ticks=8)
        axes.set_xlabel("step")
        svg = save("Events over steps")
    more = len(kinds) - len(shown)
    return Chart("Time line", svg, f"{more} more kinds of events are in the table below." if more else "", wide=True)


def _panels(figure: Figure, width: int, height: int, *, two: bool) -> list[Axes]:
    left, right, top, bottom = 58, 10, 18, 40
    share, gap = (44, 14) if two else (0, 0)
    span = (width - left - right) / width

    def panel(base: int, tall: int) -> Axes:
        return figure.add_axes((left / width, base / height, span, tall / height))

    upper = panel(bottom + share + gap, height - top - bottom - share - gap)
    return [upper, panel(bottom, share)] if two else [upper]


def _draw(axes: Axes, line: Line, *, log: bool) -> bool:
    """Draw one line; returns whether it was thinned."""
    shown = drawable(line.series)
    if log:
        shown = Series(shown.steps[shown.values > 0], shown.values[shown.values > 0])
    few = thin(shown)
    alone = len(few) == 1
    look = {
        "line": {"linestyle": "-", "marker": "o" if alone else ""},
        "faint": {"linestyle": "-", "alpha": 1.0 if alone else 0.35, "linewidth": 1.0, "marker": "o" if alone else ""},
        "dashed": {"linestyle": "--", "marker": "o" if alone else ""},
        "dotted": {"linestyle": ":", "marker": "o" if alone else ""},
        "ring": {"linestyle": "", "marker": "o", "markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.6},
        "diamond": {"linestyle": "", "marker": "D", "markersize": 6},
        "point": {"linestyle": "-" if len(few) > 1 else "", "linewidth": 1.2, "marker": "o" if len(few) < 60 else ""},
    }[line.look]
    axes.plot(few.steps, few.values, color=line.color, **{"markersize": 4.5, **look, **line.details})
    return len(few) < len(shown)


def _draw_share(axes: Axes, line: Line, last_step: int) -> bool:
    shown = drawable(line.series)
    few = thin(shown)
    axes.fill_between(few.steps, few.values, color=line.color, alpha=0.25, linewidth=0)
    axes.plot(few.steps, few.values, color=line.color, linewidth=1.2, marker="o" if len(few) == 1 else "", markersize=4)
    finish_axes(axes, last_step)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 1], ["0 %", "100 %"])
    return len(few) < len(shown)


def _mark_broken(axes: Axes, lines: Sequence[Line]) -> str:
    """Mark the steps whose value cannot be drawn along the top edge; returns the words for the legend."""
    distinct = list({id(line.series): line.series for line in lines}.values())
    steps = [series.steps[~np.isin(series.steps, drawable(series).steps)] for series in distinct]
    count = sum(map(len, steps))
    if not count:
        return ""
    places = spread(np.unique(np.concatenate(steps)))
    axes.plot(
        places, np.full(len(places), 1.03), "x", color=BROKEN, markersize=6, clip_on=False,
        transform=axes.get_xaxis_transform(), markeredgewidth=1.6,
    )  # fmt: skip
    beyond = any(len(series.finite) > len(drawable(series)) for series in distinct)
    return f"not finite{f' or beyond {OFF_SCALE:g}' * beyond}: {count:,}, first at step {int(places[0]):,}"


def _is_trouble(kind: str) -> bool:
    return kind in ("rollback", "diverged", "guard_yields", "verdict") or kind.endswith(("_failed", "_skipped"))
