"""Heat maps: rows of layers or heads, columns of steps, colours for values, and marks where there is none."""

from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tameformer.report.axes import OFF_SCALE, step_ticks
from tameformer.report.drawing import BROKEN, MUTED, NARROW, PARTLY, WIDE, Chart, drawing
from tameformer.report.read import Probe
from tameformer.report.wording import fitted, short_names, tick

COLUMNS, ROWS = 400, 1200  # a heat map is drawn with at most this many cells either way ...
CELLS = 80_000  # ... and about this many in all, which bounds the size of its picture
SHADES = 63  # steps of colour in a heat map: finer ones cannot be told apart and double the file


def by_layer(probe: Probe) -> tuple[Probe, np.ndarray]:
    """One row a layer: the mean over its finite heads, NaN where none is; and where only some were finite.

    Returns:
        The layers' probe, and a mask of shape (layers, steps).

    Example:
        >>> rows, steps = (("a", 0), ("a", 1)), np.array([0, 10])
        >>> values = np.array([[1.0, 2.0], [3.0, np.nan]])
        >>> mean, some = by_layer(Probe("p", rows, steps, values, np.ones((2, 2), dtype=bool)))
        >>> mean.values.tolist(), some.tolist()
        ([[2.0, 2.0]], [[False, True]])
    """
    values = np.full((len(probe.layers), len(probe.steps)), np.nan)
    measured, some = np.zeros(values.shape, dtype=bool), np.zeros(values.shape, dtype=bool)
    layers = np.array([probe.layers.index(layer) for layer, _ in probe.rows])
    for layer in range(len(probe.layers)):
        heads, known = probe.values[layers == layer], probe.measured[layers == layer]
        finite = known & np.isfinite(heads)
        count = finite.sum(axis=0)
        total = np.where(finite, heads, 0.0).sum(axis=0)
        values[layer] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        measured[layer] = known.any(axis=0)
        some[layer] = (count > 0) & (known & ~finite).any(axis=0)
    return Probe(probe.name, tuple((layer, None) for layer in probe.layers), probe.steps, values, measured), some


def heat_map(
    title: str,
    probe: Probe,
    *,
    last_step: int,
    share: bool = False,
    scale: Literal["linear", "log"] | None = None,
    some: np.ndarray | None = None,
    keep: Literal["lowest", "largest"] = "largest",
    marks: Sequence[int] = (),
    wide: bool = True,
    caption: str = "",
) -> Chart:
    """Rows of layers and heads, columns of steps, colour for values; red where not finite, grey where not measured.

    Args:
        title: Heading, and the drawing's text alternative.
        probe: The values.
        last_step: End of the step axis.
        share: The values are shares: the colours span 0 to 1.
        scale: Of the colours; None decides by the values' range.
        some: Where a value stands for heads of which some were not finite, shape (rows, steps).
        keep: Which of several measurements falling into one column is drawn: nothing is averaged.
        marks: Steps to point at with a vertical line.
        wide: Across the page, or half of it.
        caption: What the reader must know beyond the scale.
    """
    rows, cells, present, extent = _grid(probe, probe.values, probe.measured, keep)
    drawn = present & np.isfinite(cells) & (np.abs(np.nan_to_num(cells)) < OFF_SCALE)
    norm = _color_scale(cells[drawn], share=share, scale=scale)
    colors = _shaded(cells, drawn, norm)
    if some is not None and some.any():
        colors[_grid(probe, some.astype(float), some, "largest")[2]] = (*_bytes(PARTLY), 255)
    colors[present & ~drawn] = (*_bytes(BROKEN), 255)
    colors[~present] = (0xE9, 0xEC, 0xEF, 255)

    labels, prefix, suffix = short_names(probe.layers)
    labels = fitted(labels, 30)
    row_height = _row_height(len(rows), len(labels))
    with_heads = any(head is not None for _, head in rows)
    numbered = with_heads and row_height >= 9
    top, bottom, right = 20, 42, 84
    left = 30 + min(196, int(6.4 * max(map(len, labels)))) + (26 if numbered else 0)
    width, height = WIDE if wide else NARROW, int(top + bottom + row_height * len(rows))
    with drawing(width, height) as (figure, save):
        box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
        axes = figure.add_axes(box)
        axes.imshow(colors, aspect="auto", interpolation="none", extent=(*extent, len(rows) - 0.5, -0.5))
        _label_rows(axes, rows, labels, row_height, numbered=numbered)
        axes.spines[:].set_visible(False)
        axes.set_xlim(*extent)
        for step in marks:
            axes.axvline(step, color="white", linewidth=2.4)
            axes.axvline(step, color=BROKEN, linewidth=1.2, linestyle="--")
        step_ticks(axes, 8 if wide else 5, last_step)
        axes.set_xlabel("step")
        bar_height = min(height - top - bottom, 220)
        place = ((width - right + 18) / width, (height - top - bar_height) / height, 12 / width, bar_height / height)
        _color_bar(figure, place, norm, bar_height, share=share)
        svg = save(title)
    notes = [caption] if caption else []
    if prefix or suffix:
        notes.append(f"The rows are {prefix}*{suffix}{', in each its heads from the top' if with_heads else ''}.")
    if cells.shape[1] < len(probe.steps) or len(rows) < len(probe.rows):
        notes.append(f"Where several measurements fall into one cell, the {keep} is drawn.")
    legend = _legend(probe, some, off_scale=bool((present & ~drawn).any()))
    if (~present).any():
        legend.append(("not measured, or without a ceiling" if share else "not measured", "#c9d0d6", "box"))
    return Chart(title, svg, " ".join(notes), wide=wide, legend=tuple(legend))


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
    columns = min(COLUMNS, CELLS // len(rows))
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


def _color_scale(finite: np.ndarray, *, share: bool, scale: Literal["linear", "log"] | None) -> Normalize:
    if share or not len(finite):
        return Normalize(0.0, 1.0, clip=True)
    low, high = float(finite.min()), float(finite.max())
    positive = finite[finite > 0]
    if scale == "log" and len(positive) and high > low >= 0 and high > positive.min():
        return LogNorm(float(positive.min()), high, clip=True)
    if scale is None and low > 0 and high > 1000 * low:
        return LogNorm(low, high, clip=True)
    if low == high:
        low, high = low - max(abs(low), 1.0) / 2, high + max(abs(high), 1.0) / 2
    return Normalize(low, high, clip=True)


def _shaded(cells: np.ndarray, drawn: np.ndarray, norm: Normalize) -> np.ndarray:
    """Colours of the cells that are drawn, shape (rows, columns, 4), in few enough steps to compress well."""
    shades = np.ma.filled(norm(np.where(drawn, cells, float(norm.vmin or 0.0))), 0.0)
    return matplotlib.colormaps["viridis"](np.round(shades * SHADES) / SHADES, bytes=True)


def _legend(probe: Probe, some: np.ndarray | None, *, off_scale: bool) -> list[tuple[str, str, str]]:
    """What is not finite, how much of it, and since when."""

    def told(where: np.ndarray) -> str:
        return f"{int(where.sum()):,}, first at step {int(probe.steps[where.any(axis=0)][0]):,}"

    broken = probe.measured & ~np.isfinite(probe.values)
    legend = []
    if some is not None and some.any():
        legend.append((f"some heads not finite: {told(some)}", PARTLY, "box"))
    if broken.any():
        legend.append((f"not finite: {told(broken)}", BROKEN, "box"))
    elif off_scale:
        legend.append((f"beyond {OFF_SCALE:g}", BROKEN, "box"))
    return legend


def _bytes(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


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
    axes.set_yticks(middles[::every], labels[::every])
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
