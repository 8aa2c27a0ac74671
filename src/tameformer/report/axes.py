"""What the figures of the report share: which points are drawn, how axes are ticked."""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tameformer.report.read import Series
from tameformer.report.wording import tick

BUCKETS = 300  # a line is drawn with the lowest and the highest point of this many stretches, and its two ends
OFF_SCALE = 1e30  # beyond it a value is marked like a non-finite one, since no axis could show the others beside it


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


def wants_log(values: np.ndarray) -> bool:
    """Whether finite values span so wide a range, all above 0, that a logarithmic axis shows them better."""
    return len(values) > 0 and bool(values.min() > 0) and bool(values.max() > 50 * values.min())


def drawable(series: Series) -> Series:
    """The points that an axis can show: finite and within `OFF_SCALE`."""
    keep = np.isfinite(series.values) & (np.abs(np.nan_to_num(series.values)) < OFF_SCALE)
    return Series(series.steps[keep], series.values[keep])


def spread(places: np.ndarray) -> np.ndarray:
    """As many of the places as can be told apart, the first and the last among them."""
    if len(places) <= BUCKETS:
        return places
    return places[np.linspace(0, len(places) - 1, BUCKETS).astype(np.int64)]


def finish_axes(axes: Axes, last_step: int, *, ticks: int = 6) -> None:
    """The step axis from 0 to the last step, with about that many ticks, and level lines."""
    pad = max(0.02 * last_step, 0.5)
    axes.set_xlim(-pad, last_step + pad)
    step_ticks(axes, ticks, last_step)
    axes.grid(axis="y")


def step_ticks(axes: Axes, count: int, last_step: int) -> None:
    """About `count` labelled whole steps."""
    axes.xaxis.set_major_locator(MaxNLocator(count, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: tick(float(value), float(last_step)) if value >= 0 else "")
    )


def value_ticks(axes: Axes, values: np.ndarray, *, log: bool, percent: bool) -> None:
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
