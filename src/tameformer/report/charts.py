"""The figures of the report: series and probes in, one inline SVG each out; no file, no state, no network."""

import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tameformer.report.read import Event, Probe, Series, clean
from tameformer.report.verdict import number

BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#00795c", "#a94f86"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, "#b07d00", "#3f9fd8", "#444444")  # Okabe-Ito, darkened to read on white
DASHES = ("-", "--", ":", "-.")
INK, MUTED, GRID, BROKEN = "#1f2933", "#5b6773", "#e3e7eb", "#c1121f"
BUCKETS = 300  # a line is drawn with the lowest and the highest point of this many stretches, and its two ends
WIDE = 720  # pixels across a drawing that spans the page, before it is scaled to it
COLUMNS, ROWS = 400, 1200  # a heat map is drawn with at most this many cells either way
SHADES = 63  # steps of colour in a heat map: finer ones cannot be told apart and double the file
OFF_SCALE = 1e30  # beyond it a value is marked like a non-finite one, since no axis could show the others beside it

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, small, and in the reader's own font
    "svg.hashsalt": "tameformer",  # the same run gives the same file
    "text.parse_math": False,  # a dollar sign in a layer's name is a dollar sign
    "axes.unicode_minus": True,
    "font.size": 10,
    "axes.edgecolor": "#9aa5b1",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
}
_POINTS_PER_PIXEL = 0.75
_REFERENCE = re.compile(r"#([\w-]+)")
_DECIMALS = re.compile(r"(-?\d+\.\d)\d+")
_FONT = re.compile(r"font: (?:[\w ]*?)([\d.]+)px [^;]*;?")


@dataclass(frozen=True)
class Chart:
    """A figure of the page: its heading, its drawing as safe inline SVG, what to know when reading it."""

    title: str
    svg: str
    caption: str = ""
    wide: bool = False
    legend: tuple[tuple[str, str, str], ...] = ()
    """Text, colour and mark (`line`, `faint`, `dashed`, `dotted`, `point`, `cross`, `box`) of each entry."""


@dataclass(frozen=True)
class Line:
    """One series of a line chart and how to draw it."""

    label: str
    series: Series
    color: str = BLUE
    look: Literal["line", "faint", "dashed", "dotted", "point", "ring", "diamond"] = "line"
    details: dict[str, Any] = field(default_factory=dict)


def thin(series: Series, buckets: int = BUCKETS) -> Series:
    """The series with at most 2 points per bucket and its two ends, keeping the lowest and highest of each bucket.

    Non-finite values must have been taken out before.

    Example:
        >>> long = Series(np.arange(10_000), np.sin(np.arange(10_000.0)))
        >>> len(thin(long)) <= 2 * BUCKETS + 2, bool(thin(long).values.max() == long.values.max())
        (True, True)
    """
    if len(series) <= 2 * buckets + 2:
        return series
    keep = {0, len(series) - 1}
    edges = np.linspace(0, len(series), buckets + 1).astype(np.int64)
    for start, stop in pairwise(edges.tolist()):
        part = series.values[start:stop]
        keep.update((int(start + part.argmin()), int(start + part.argmax())))
    index = np.array(sorted(keep))
    return Series(series.steps[index], series.values[index])


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    last_step: int,
    log: bool | None = None,
    lower: Line | None = None,
    percent: bool = False,
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
        caption: What the reader must know beyond the legend.
    """
    notes = [caption] if caption else []
    values = np.concatenate([_drawable(line.series).values for line in lines] or [np.zeros(0)])
    positive = values[values > 0]
    if log is None:
        log = len(values) > 0 and bool(values.min() > 0) and bool(values.max() > 50 * values.min())
    log = log and len(np.unique(positive)) > 1
    with _drawing(520, 280) as (figure, save):
        panels = _panels(figure, 520, 280, two=lower is not None)
        axes = panels[0]
        thinned = False
        for line in lines:
            thinned |= _draw(axes, line, log=log)
        if log:
            axes.set_yscale("log")
            notes.append(
                "Logarithmic axis" + ("." if len(positive) == len(values) else "; values of 0 or below are not shown.")
            )
        _finish_axes(axes, last_step)
        _value_ticks(axes, positive if log else values, log=log, percent=percent)
        marks = _mark_broken(axes, lines)
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
    if marks:
        legend.append((marks, BROKEN, "cross"))
    return Chart(title, svg, " ".join(notes), legend=tuple(legend))


def heat_map(
    title: str,
    probe: Probe,
    *,
    last_step: int,
    ceiling: np.ndarray | None = None,
    keep: Literal["lowest", "largest"] = "largest",
    caption: str = "",
) -> Chart:
    """Rows of layers and heads, columns of steps, colour for values; red where not finite, grey where not measured.

    Args:
        title: Heading, and the drawing's text alternative.
        probe: The values.
        last_step: End of the step axis.
        ceiling: Largest possible value of each entry, shape (rows, steps); the colour is then the share of it.
        keep: Which of several measurements falling into one column is drawn: nothing is averaged.
        caption: What the reader must know beyond the scale.
    """
    values, measured = probe.values, probe.measured
    if ceiling is not None:
        measured = measured & ((ceiling > 0) | ~np.isfinite(values))
        values = values / np.where(ceiling > 0, ceiling, np.nan)
    rows, cells, present, extent = _grid(probe, values, measured, keep)
    drawn = present & np.isfinite(cells) & (np.abs(np.nan_to_num(cells)) < OFF_SCALE)
    norm = _color_scale(cells[drawn], share=ceiling is not None)
    shades = np.asarray(norm(np.where(drawn, cells, float(norm.vmin or 0.0))))
    colors = matplotlib.colormaps["viridis"](np.round(shades * SHADES) / SHADES, bytes=True)
    colors[present & ~drawn] = (0xC1, 0x12, 0x1F, 255)
    colors[~present] = (0xE9, 0xEC, 0xEF, 255)

    labels, prefix, suffix = short_names(probe.layers)
    row_height = _row_height(len(rows), len(labels))
    with_heads = any(head is not None for _, head in rows)
    numbered = with_heads and row_height >= 9
    top, bottom, right = 20, 42, 84
    left = 30 + min(196, int(6.4 * max(len(_shorten(text, 30)) for text in labels))) + (26 if numbered else 0)
    width, height = WIDE, int(top + bottom + row_height * len(rows))
    with _drawing(width, height) as (figure, save):
        box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        axes = figure.add_axes(box)
        axes.imshow(colors, aspect="auto", interpolation="none", extent=(*extent, len(rows) - 0.5, -0.5))
        _label_rows(axes, rows, labels, row_height, numbered=numbered)
        axes.spines[:].set_visible(False)
        axes.set_xlim(*extent)
        _step_ticks(axes, 8, last_step)
        axes.set_xlabel("step")
        bar_height = min(height - top - bottom, 220)
        place = ((width - right + 18) / width, (height - top - bar_height) / height, 12 / width, bar_height / height)
        _color_bar(figure, place, norm, bar_height, share=ceiling is not None)
        svg = save(title)
    notes = [caption] if caption else []
    if prefix or suffix:
        notes.append(f"The rows are {prefix}*{suffix}{', in each its heads from the top' if with_heads else ''}.")
    if cells.shape[1] < len(probe.steps) or len(rows) < len(probe.rows):
        notes.append(f"Where several measurements fall into one cell, the {keep} is drawn.")
    broken = probe.measured & ~np.isfinite(probe.values)
    legend = []
    if broken.any():
        first = int(probe.steps[broken.any(axis=0)][0])
        legend.append((f"not finite: {int(broken.sum()):,}, first at step {first:,}", BROKEN, "box"))
    elif (present & ~drawn).any():
        legend.append((f"beyond {OFF_SCALE:g}", BROKEN, "box"))
    if (~present).any():
        legend.append(("not measured" if ceiling is None else "not measured, or without a ceiling", "#c9d0d6", "box"))
    return Chart(title, svg, " ".join(notes), wide=True, legend=tuple(legend))


def probe_chart(probe: Probe, *, last_step: int) -> Chart:
    """Any probe: lines for a few layers, a heat map for heads or many layers."""
    title = probe.name.replace("_", " ").capitalize()
    if len(probe.rows) > 6 or any(head is not None for _, head in probe.rows):
        return heat_map(title, probe, last_step=last_step)
    labels, _, _ = short_names(probe.layers)
    lines = [Line(labels[row], probe.series(row), PALETTE[row % len(PALETTE)]) for row in range(len(probe.rows))]
    return line_chart(title, lines, last_step=last_step)


def event_chart(events: Sequence[Event], *, last_step: int) -> Chart:
    """One row a kind of event, one mark an event, over steps."""
    kinds = list(dict.fromkeys(event.kind for event in events))
    shown = kinds[:12]
    height = 44 + 22 * len(shown)
    with _drawing(WIDE, height) as (figure, save):
        left = 24 + min(170, int(6.4 * max((len(kind) for kind in shown), default=1)))
        axes = figure.add_axes((left / WIDE, 38 / height, (WIDE - left - 24) / WIDE, (height - 44) / height))
        for row, kind in enumerate(shown):
            steps = _spread(np.unique([event.step for event in events if event.kind == kind]))
            color = BROKEN if _is_trouble(kind) else BLUE
            axes.plot(steps, np.full(len(steps), row), "X" if _is_trouble(kind) else "o", color=color, markersize=6)
        axes.set_yticks(range(len(shown)), [_shorten(kind.replace("_", " "), 28) for kind in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        _finish_axes(axes, last_step, ticks=8)
        axes.set_xlabel("step")
        svg = save("Events over steps")
    more = len(kinds) - len(shown)
    return Chart("Time line", svg, f"{more} more kinds of events are in the table below." if more else "", wide=True)


def short_names(layers: Sequence[str]) -> tuple[list[str], str, str]:
    """The layers without the dotted beginning and end that all share, and those two.

    Example:
        >>> short_names(["net.blocks.0.attention", "net.blocks.11.attention"])
        (['0', '11'], 'net.blocks.', '.attention')
    """
    parts = [layer.split(".") for layer in layers]
    if len(parts) < 2:
        return list(layers), "", ""
    room = min(map(len, parts)) - 1
    head = _shared(parts, room)
    tail = _shared([part[::-1] for part in parts], room - head)
    names = [".".join(part[head : len(part) - tail]) for part in parts]
    prefix = "".join(f"{word}." for word in parts[0][:head])
    suffix = "".join(f".{word}" for word in parts[0][len(parts[0]) - tail :])
    return names, prefix, suffix


def _shared(parts: Sequence[Sequence[str]], room: int) -> int:
    count = 0
    while count < room and len({part[count] for part in parts}) == 1:
        count += 1
    return count


@contextmanager
def _drawing(width: int, height: int) -> Iterator[tuple[Figure, Callable[[str], str]]]:
    """A figure of that many pixels, and the function that turns it into SVG under a title."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs missing from matplotlib's font: the browser has its own
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        canvas = FigureCanvasSVG(figure)

        def save(title: str) -> str:
            out = io.StringIO()
            canvas.print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
            return _inline(out.getvalue(), title, width, height)

        yield figure, save


def _inline(svg: str, title: str, width: int, height: int) -> str:
    """Matplotlib's SVG as part of an HTML page: titled, scalable, without header, foreign names or idle digits."""
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    used = {name for element in root.iter() for value in _links(element) for name in _REFERENCE.findall(value)}
    salt = f"{zlib.crc32((svg + clean(title)).encode()):08x}-"
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == "metadata" or (child.tag == "defs" and child.find("style") is not None):
                parent.remove(child)
    for element in root.iter():
        _tidy(element, used, salt)
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": clean(title)}
    heading = ElementTree.Element("title")
    heading.text = clean(title)
    root.insert(0, heading)
    return re.sub(r">\s*\n\s*<", "><", ElementTree.tostring(root, encoding="unicode"))


def _links(element: ElementTree.Element) -> list[str]:
    return [value for name, value in element.attrib.items() if name in ("href", "clip-path", "fill", "style")]


def _tidy(element: ElementTree.Element, used: set[str], salt: str) -> None:
    attributes = element.attrib
    if attributes.get("id") in used:
        attributes["id"] = salt + attributes["id"]
    else:
        attributes.pop("id", None)
    for name in ("href", "clip-path"):
        if name in attributes and not attributes[name].startswith("data:"):
            attributes[name] = attributes[name].replace("#", f"#{salt}")
    for name in ("d", "x", "y"):
        if name in attributes and element.tag != "image":
            attributes[name] = " ".join(_DECIMALS.sub(r"\1", attributes[name]).split())
    if "style" in attributes:
        attributes["style"] = _FONT.sub(r"font-size: \1px;", attributes["style"])


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
    shown = _drawable(line.series)
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
    shown = _drawable(line.series)
    few = thin(shown)
    axes.fill_between(few.steps, few.values, color=line.color, alpha=0.25, linewidth=0)
    axes.plot(few.steps, few.values, color=line.color, linewidth=1.2, marker="o" if len(few) == 1 else "", markersize=4)
    _finish_axes(axes, last_step)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0, 1], ["0 %", "100 %"])
    return len(few) < len(shown)


def _drawable(series: Series) -> Series:
    keep = np.isfinite(series.values) & (np.abs(np.nan_to_num(series.values)) < OFF_SCALE)
    return Series(series.steps[keep], series.values[keep])


def _mark_broken(axes: Axes, lines: Sequence[Line]) -> str:
    """Mark the steps whose value cannot be drawn along the top edge; returns the words for the legend."""
    distinct = list({id(line.series): line.series for line in lines}.values())
    steps = [series.steps[~np.isin(series.steps, _drawable(series).steps)] for series in distinct]
    count = sum(map(len, steps))
    if not count:
        return ""
    places = _spread(np.unique(np.concatenate(steps)))
    axes.plot(
        places, np.full(len(places), 1.03), "x", color=BROKEN, markersize=6, clip_on=False,
        transform=axes.get_xaxis_transform(), markeredgewidth=1.6,
    )  # fmt: skip
    beyond = any(len(series.finite) > len(_drawable(series)) for series in distinct)
    return f"not finite{f' or beyond {OFF_SCALE:g}' * beyond}: {count:,}, first at step {int(places[0]):,}"


def _spread(places: np.ndarray) -> np.ndarray:
    """As many of the places as can be told apart, the first and the last among them."""
    if len(places) <= BUCKETS:
        return places
    return places[np.linspace(0, len(places) - 1, BUCKETS).astype(np.int64)]


def _finish_axes(axes: Axes, last_step: int, *, ticks: int = 6) -> None:
    pad = max(0.02 * last_step, 0.5)
    axes.set_xlim(-pad, last_step + pad)
    _step_ticks(axes, ticks, last_step)
    axes.grid(axis="y")


def _step_ticks(axes: Axes, count: int, last_step: int) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(count, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: tick(float(value), float(last_step)) if value >= 0 else "")
    )


def _value_ticks(axes: Axes, values: np.ndarray, *, log: bool, percent: bool) -> None:
    """About five labelled values: round ones, on a short logarithmic axis also twos and fives."""
    largest = float(np.abs(values).max()) if len(values) else 1.0
    if log and values.max() > 3 * values.min():
        subs = (1.0, 2.0, 5.0) if values.max() < 50 * values.min() else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=6 if len(subs) == 1 else 12))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(float(value), float(value))))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{100 * value:.4g} %" if percent else tick(float(value), largest))
        )
    axes.yaxis.set_minor_locator(NullLocator())


def tick(value: float, largest: float) -> str:
    """A number for an axis whose largest one is `largest`, which decides on thousands (k), millions (M), billions (G).

    Example:
        >>> tick(8e3, 4e4), tick(8e3, 9e3), tick(0.0, 4e4), tick(2.5e6, 4e6)
        ('8k', '8,000', '0', '2.5M')
    """
    for limit, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if limit <= abs(largest) < 1e13 and value:
            return f"{value / size:.4g}{letter}".replace("-", "\u2212", 1)
    return number(value) if value >= 0 else "\u2212" + number(-value)


def _grid(
    probe: Probe, values: np.ndarray, measured: np.ndarray, keep: str
) -> tuple[Sequence[tuple[str, int | None]], np.ndarray, np.ndarray, tuple[float, float]]:
    """Rows, values, whether measured, and the steps spanned, on a grid small enough to see and evenly spaced in steps.

    Neighbouring heads share a row only where there are too many rows; a column without a measurement of its own holds
    the last one before it.
    """
    rows, steps = list(probe.rows), probe.steps
    if len(rows) > ROWS:
        size = int(np.ceil(len(rows) / ROWS))
        starts = [
            row for layer in probe.layers for row in [i for i, (name, _) in enumerate(rows) if name == layer][::size]
        ]
        stops = [*starts[1:], len(rows)]
        merged = [
            _reduce(values[start:stop].T, measured[start:stop].T, keep)
            for start, stop in zip(starts, stops, strict=True)
        ]
        values, measured = np.stack([pair[0] for pair in merged]), np.stack([pair[1] for pair in merged])
        rows = [rows[start] for start in starts]
    gaps = np.diff(steps)
    gap = float(np.median(gaps)) if len(gaps) else 1.0
    extent = (float(steps[0]) - gap / 2, float(steps[-1]) + gap / 2)
    columns = COLUMNS if len(rows) <= 200 else COLUMNS * 3 // 5
    if len(steps) <= columns and (not len(gaps) or (gaps == gaps[0]).all()):
        return rows, values, measured, extent
    edges = np.linspace(*extent, columns + 1)
    starts, stops = (np.searchsorted(steps, side).tolist() for side in (edges[:-1], edges[1:]))
    spans = [
        (start, stop) if stop > start else (max(start - 1, 0), max(start, 1))
        for start, stop in zip(starts, stops, strict=True)
    ]
    reduced = [_reduce(values[:, start:stop], measured[:, start:stop], keep) for start, stop in spans]
    return rows, np.stack([pair[0] for pair in reduced], 1), np.stack([pair[1] for pair in reduced], 1), extent


def _reduce(values: np.ndarray, measured: np.ndarray, keep: str) -> tuple[np.ndarray, np.ndarray]:
    """One value per row and whether any was measured: NaN if a measured one is not finite, else the one to keep."""
    broken = (measured & ~np.isfinite(values)).any(axis=1)
    rank = np.where(measured & np.isfinite(values), values if keep == "lowest" else -np.abs(values), np.inf)
    chosen = np.take_along_axis(values, rank.argmin(axis=1)[:, None], axis=1)[:, 0]
    return np.where(broken, np.nan, chosen), np.asarray(measured.any(axis=1))


def _color_scale(finite: np.ndarray, *, share: bool) -> Normalize:
    if share:
        return Normalize(0.0, 1.0, clip=True)
    if not len(finite):
        return Normalize(0.0, 1.0, clip=True)
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high > 1000 * low:
        return LogNorm(low, high, clip=True)
    if low == high:
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    return Normalize(low, high, clip=True)


def _row_height(rows: int, layers: int) -> float:
    """Pixels a row: thick for a few, thin for many, never too thin to be seen, with room for the layers' labels."""
    if rows <= 4:
        return 24.0
    return max(1.25, min(16.0, 380 / rows), 12.0 * layers / rows if layers <= 120 else 0.0)


def _label_rows(
    axes: Axes, rows: Sequence[tuple[str, int | None]], labels: Sequence[str], row_height: float, *, numbered: bool
) -> None:
    """A label at the middle of each layer's rows, a thin line between layers, head numbers where there is room."""
    firsts = [row for row, (layer, _) in enumerate(rows) if row == 0 or rows[row - 1][0] != layer]
    stops = [*firsts[1:], len(rows)]
    middles = [(first + stop - 1) / 2 for first, stop in zip(firsts, stops, strict=True)]
    every = max(1, int(np.ceil(11 * len(labels) / (row_height * len(rows)))))
    axes.set_yticks(middles[::every], [_shorten(text, 30) for text in labels[::every]])
    axes.tick_params(axis="y", pad=30 if numbered else 5)
    corner: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "ha": "right",
        "va": "bottom",
        "color": MUTED,
    }
    axes.annotate("layer", (0, 1), (-30 if numbered else -5, 5), fontsize=9, **corner)
    if numbered:
        axes.annotate("head", (0, 1), (-4, 5), fontsize=9, **corner)
        axes.set_yticks(range(len(rows)), ["" if head is None else str(head) for _, head in rows], minor=True)
        axes.tick_params(axis="y", which="minor", size=0, pad=5, labelsize=9)
    if 1 < len(firsts) < len(rows):
        for first in firsts[1:]:
            axes.axhline(first - 0.5, color="white", linewidth=min(1.2, row_height / 3))


def _color_bar(figure: Figure, place: tuple[float, ...], norm: Normalize, height: int, *, share: bool) -> None:
    bar = figure.add_axes(place)  # pyright: ignore[reportArgumentType, reportCallIssue]
    scale = figure.colorbar(ScalarMappable(norm, "viridis"), cax=bar)
    scale.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    largest = float(max(abs(norm.vmin or 0.0), abs(norm.vmax or 0.0)))
    if isinstance(norm, LogNorm):
        scale.set_ticks(list(np.geomspace(float(norm.vmin or 0), float(norm.vmax or 0), 4)))
        scale.minorticks_off()
    else:
        bar.yaxis.set_major_locator(MaxNLocator(5 if height > 90 else 1))
    bar.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{100 * value:.0f} %" if share else tick(float(value), largest))
    )
    bar.tick_params(size=0)


def _is_trouble(kind: str) -> bool:
    return kind in ("non_finite", "rollback", "diverged") or kind.endswith(("_failed", "_skipped"))


def _shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]}\u2026{text[-(limit - limit // 2 - 1) :]}"
