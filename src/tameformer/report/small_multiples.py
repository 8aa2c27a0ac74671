"""Small multiples of a probe with heads: a panel a layer, a line a head, all panels on the same axes."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from tameformer.report.axes import OFF_SCALE, drawable, finish_axes, spread, thin, value_ticks, wants_log
from tameformer.report.curves import Mark, draw_marks
from tameformer.report.drawing import BROKEN, MUTED, NARROW, PALETTE, WIDE, Chart, drawing
from tameformer.report.quantities import Quantity
from tameformer.report.read import Probe, Series, share_of
from tameformer.report.wording import fitted, place_names, short_names

COLUMNS, PANELS = 4, 12  # panels beside each other, and at most in one figure
BESIDE = 2  # panels up to which the figure takes half the width, beside the map of the layers
LINES = 16  # heads with a line of their own in one panel
POINTS = 6_000  # points of all lines together, which bounds the size of the figure
_PANEL_HEIGHT, _GAP = 104, 26


def small_multiples(
    title: str,
    probe: Probe,
    quantity: Quantity,
    *,
    last_step: int,
    ceiling: np.ndarray | None = None,
    floor: np.ndarray | None = None,
    marks: Sequence[int] = (),
) -> Chart:
    """A panel for each layer, or for the most worrying of very many, with a line for each head.

    Args:
        title: Heading, and the drawing's text alternative.
        probe: The values, by layer and head.
        quantity: How it is drawn; which end is worrying decides what is shown where not all can be.
        last_step: End of the step axis.
        ceiling: Largest possible values, shape (rows, steps), drawn dashed.
        floor: Lower bounds, shape (rows, steps); the lowest of a panel is drawn dotted.
        marks: Steps to point at with a vertical line.
    """
    concern = _concern(probe, quantity, ceiling)
    layers = chosen_layers(probe, concern)
    rows = {layer: chosen_rows(probe, layer, concern) for layer in layers}
    count = sum(map(len, rows.values()))
    all_values = np.concatenate([drawable(probe.series(row)).values for row in range(len(probe.rows))])
    positive = all_values[all_values > 0]
    log = wants_log(all_values) if quantity.scale is None else quantity.scale == "log"
    log = log and len(np.unique(positive)) > 1
    extra = [] if ceiling is None or log else [ceiling[np.isfinite(ceiling)]]
    limits = _limits(np.concatenate([positive if log else all_values, *extra]), log=log)
    buckets = int(np.clip(POINTS // (2 * max(count, 1)), 8, 80))

    labels, (_, prefix, suffix) = fitted(place_names(probe.layers), 24), short_names(probe.layers)
    width = WIDE if len(layers) > BESIDE else NARROW
    across, down = min(COLUMNS, len(layers)), -(-len(layers) // COLUMNS)
    left, right, top, bottom = 52, 12, 20, 40
    height = top + bottom + down * _PANEL_HEIGHT + (down - 1) * _GAP
    span = (width - left - right - (across - 1) * 14) / across
    heads = sorted({head for layer in layers for row in rows[layer] if (head := probe.rows[row][1]) is not None})
    colors = _colors(heads)
    banded = broken = 0
    with drawing(width, height) as (figure, save):
        for index, layer in enumerate(layers):
            line, column = divmod(index, across)
            low = height - top - (line + 1) * _PANEL_HEIGHT - line * _GAP
            place = (left + column * (span + 14), low, span, _PANEL_HEIGHT)
            axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
            if log:
                axes.set_yscale("log")
            of_layer = [row for row, (name, _) in enumerate(probe.rows) if name == layer]
            banded += _draw_band(axes, probe, of_layer, buckets, log=log) if len(of_layer) > len(rows[layer]) else 0
            for row in rows[layer]:
                _draw_head(axes, probe.series(row), colors.get(probe.rows[row][1], PALETTE[0]), buckets, log=log)
            _draw_limit(axes, probe.steps, ceiling, of_layer, "--", buckets)
            _draw_limit(axes, probe.steps, floor, of_layer, ":", buckets)
            broken += _cross_broken(axes, probe, of_layer)
            _finish(axes, labels[probe.layers.index(layer)], limits, last_step, log=log)
            draw_marks(axes, [Mark(step) for step in marks], last_step)
            axes.tick_params(labelleft=column == 0, labelbottom=index + across >= len(layers))
            if index + across >= len(layers):
                axes.set_xlabel("step")
        svg = save(title)
    legend = _legend(heads, colors)
    legend += [("ceiling", MUTED, "dashed")] if ceiling is not None else []
    legend += [("lower bound, of the lowest head", MUTED, "dotted")] if floor is not None else []
    legend += [("range of all heads", "#c9d0d6", "box")] if banded else []
    legend += [(f"not finite: {broken:,}", BROKEN, "cross")] if broken else []
    notes = [_left_out(probe, layers, rows, quantity)] if prefix + suffix == "" else [
        f"The panels are {prefix}*{suffix}.", _left_out(probe, layers, rows, quantity)]  # fmt: skip
    notes += ["Logarithmic axis."] if log else []
    return Chart(title, svg, " ".join(filter(None, notes)), wide=width == WIDE, legend=tuple(legend))


def chosen_layers(probe: Probe, concern: np.ndarray) -> list[str]:
    """The layers that get a panel, in model order: all, or those of the most worrying rows.

    Args:
        probe: The layers.
        concern: How worrying each row is, shape (rows,), larger is worse; -inf where nothing is known.
    """
    if len(probe.layers) <= PANELS:
        return list(probe.layers)
    worst = {layer: -np.inf for layer in probe.layers}
    for row, (layer, _) in enumerate(probe.rows):
        worst[layer] = max(worst[layer], float(concern[row]))
    kept = set(sorted(probe.layers, key=lambda layer: -worst[layer])[:PANELS])
    return [layer for layer in probe.layers if layer in kept]


def chosen_rows(probe: Probe, layer: str, concern: np.ndarray) -> list[int]:
    """The rows of a layer that get a line, heads ascending: all, or the most worrying of very many."""
    rows = [row for row, (name, _) in enumerate(probe.rows) if name == layer]
    return sorted(sorted(rows, key=lambda row: -concern[row])[:LINES])


def _concern(probe: Probe, quantity: Quantity, ceiling: np.ndarray | None) -> np.ndarray:
    """How bad the worst finite value of each row ever was, shape (rows,); rows with a value not finite come first."""
    values = probe.values if ceiling is None else share_of(probe, ceiling).values
    known = np.isfinite(values)
    signed = np.where(known, -values if quantity.worry == "low" else np.abs(values), -np.inf)
    worst = signed.max(axis=1, initial=-np.inf)
    return np.where((probe.measured & ~np.isfinite(probe.values)).any(axis=1), np.inf, worst)


def _left_out(probe: Probe, layers: Sequence[str], rows: dict[str, list[int]], quantity: Quantity) -> str:
    end = "lowest" if quantity.worry == "low" else "largest"
    sentences = []
    if len(layers) < len(probe.layers):
        sentences.append(
            f"{len(layers)} of {len(probe.layers):,} layers are shown, those with the {end} or non-finite values; "
            "the maps show all."
        )
    most = max(sum(name == layer for name, _ in probe.rows) for layer in layers)
    if most > LINES:
        sentences.append(
            f"Of up to {most:,} heads a layer the {LINES} with the {end} or non-finite values have a line."
        )
    return " ".join(sentences)


def _limits(values: np.ndarray, *, log: bool) -> tuple[float, float]:
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if log:
        return low / 1.3, high * 1.3
    low = min(low, 0.0)
    pad = 0.06 * (high - low) or max(abs(high), 1.0) / 2
    return (low - pad if low < 0 else -0.02 * (high + pad)), high + pad


def _colors(heads: Sequence[int]) -> dict[int | None, Any]:
    if len(heads) <= len(PALETTE):
        return dict(zip(heads, PALETTE, strict=False))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(heads)))
    return {head: to_hex(shade) for head, shade in zip(heads, shades, strict=True)}


def _legend(heads: Sequence[int], colors: dict[int | None, Any]) -> list[tuple[str, str, str]]:
    if len(heads) <= len(PALETTE):
        return [(f"head {head}", colors[head], "line") for head in heads]
    return [(f"head {head}", colors[head], "line") for head in (heads[0], heads[len(heads) // 2], heads[-1])]


def _draw_head(axes: Axes, series: Series, color: Any, buckets: int, *, log: bool) -> None:
    shown = drawable(series)
    if log:
        shown = Series(shown.steps[shown.values > 0], shown.values[shown.values > 0])
    few = thin(shown, buckets)
    axes.plot(few.steps, few.values, color=color, linewidth=1.1, marker="o" if len(few) == 1 else "", markersize=3)


def _draw_band(axes: Axes, probe: Probe, rows: Sequence[int], buckets: int, *, log: bool) -> int:
    values = np.where(np.isfinite(probe.values[rows]), probe.values[rows], np.nan)
    if log:
        values = np.where(values > 0, values, np.nan)
    known = np.flatnonzero(np.isfinite(values).any(axis=0))
    known = known[np.linspace(0, len(known) - 1, min(len(known), 2 * buckets)).astype(np.int64)]
    low, high = np.nanmin(values[:, known], axis=0), np.nanmax(values[:, known], axis=0)
    keep = np.maximum(np.abs(low), np.abs(high)) < OFF_SCALE
    axes.fill_between(probe.steps[known][keep], low[keep], high[keep], color="#c9d0d6", alpha=0.6, linewidth=0)
    return 1


def _draw_limit(
    axes: Axes, steps: np.ndarray, limit: np.ndarray | None, rows: Sequence[int], style: str, buckets: int
) -> None:
    """The lowest of a layer's limits over steps: ceilings are the same for all heads, of bounds the lowest counts."""
    if limit is None:
        return
    lowest = np.where(np.isfinite(limit[rows]), limit[rows], np.inf).min(axis=0)
    few = thin(drawable(Series(steps, lowest)), buckets)
    axes.plot(few.steps, few.values, style, color=MUTED, linewidth=1)


def _cross_broken(axes: Axes, probe: Probe, rows: Sequence[int]) -> int:
    """Mark the steps at which a head is not finite along the top edge; returns how many values that were."""
    broken = probe.measured[rows] & ~np.isfinite(probe.values[rows])
    steps = spread(probe.steps[broken.any(axis=0)])[:: max(1, int(broken.any(axis=0).sum()) // 40)]
    axes.plot(
        steps, np.full(len(steps), 1.0), "x", color=BROKEN, markersize=4, clip_on=False,
        transform=axes.get_xaxis_transform(), markeredgewidth=1.2,
    )  # fmt: skip
    return int(broken.sum())


def _finish(axes: Axes, label: str, limits: tuple[float, float], last_step: int, *, log: bool) -> None:
    finish_axes(axes, last_step, ticks=3)
    value_ticks(axes, np.array(limits), log=log, percent=False)
    axes.set_ylim(*limits)
    axes.annotate(
        label, (0, 1), xycoords="axes fraction", textcoords="offset points", xytext=(0, 5), fontsize=9, color=MUTED
    )
