"""What a recipe wants to be seen, from `figures/*.json` of the run folder: pictures, lines over any axis, weighted text."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from tameformer.report.axes import drawable, value_ticks
from tameformer.report.drawing import NARROW, PALETTE, WIDE, Chart, drawing
from tameformer.report.read import Series, clean
from tameformer.report.wording import shorten

Figure = Mapping[str, Any]
_GAP = 2  # pixels of white between pictures


@dataclass(frozen=True)
class Passage:
    """A text to read with weights in [0, 1] on its lines and words."""

    heading: str
    lines: tuple[tuple[float, tuple[tuple[str, float], ...]], ...]


def task_figures(
    figures: Mapping[str, Figure],
) -> tuple[tuple[Chart, ...], tuple[Passage, ...], list[tuple[str, str]]]:
    """Charts, passages, and what cannot be drawn: name and reason."""
    charts: list[Chart] = []
    shown: list[Passage] = []
    remarks: list[tuple[str, str]] = []
    for name, figure in figures.items():
        try:
            if figure["kind"] == "images":
                charts.append(_images(figure))
            elif figure["kind"] == "lines":
                charts.append(_lines(figure))
            elif figure["kind"] == "passages":
                shown += _passages(figure)
            else:
                raise ValueError(f"there is no kind of figure {figure['kind']!r}")
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
            remarks.append((clean(name), clean(f"{type(error).__name__}: {error}")))
    return tuple(charts), tuple(shown), remarks


def _images(figure: Figure) -> Chart:
    """Rows of pictures, one above the other."""
    title, rows = clean(figure["title"]), figure["rows"]
    bands = [_band([_colors(picture) for picture in pictures]) for pictures in rows.values()]
    width = max(band.shape[1] for band in bands)
    filled = [np.pad(band, ((0, _GAP), (0, width - band.shape[1]), (0, 0)), constant_values=255) for band in bands]
    sheet = np.concatenate(filled)[:-_GAP]
    names = [shorten(clean(name), 24) for name in rows]
    left = 20 + int(6.4 * max(map(len, names)))
    scale = min(8.0, (WIDE - left - 10) / sheet.shape[1])
    height = int(scale * sheet.shape[0]) + 12
    with drawing(WIDE, height) as (canvas, save):
        span = scale * sheet.shape[1]
        axes = canvas.add_axes((left / WIDE, 6 / height, span / WIDE, scale * sheet.shape[0] / height))
        axes.imshow(sheet, aspect="auto", interpolation="none")
        edges = np.cumsum([0, *(band.shape[0] for band in filled)])
        centres = [(low + high - _GAP) / 2 for low, high in pairwise(edges.tolist())]
        axes.set_yticks(centres, names)
        axes.set_xticks([])
        axes.spines[:].set_visible(False)
        svg = save(title)
    return Chart(title, svg, clean(figure.get("caption", "")), wide=True)


def _colors(picture: Any) -> np.ndarray:
    """A picture as uint8 (height, width, 3)."""
    values = np.asarray(picture, dtype=np.float64)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3) or 0 in values.shape:
        raise ValueError(f"expected a picture of (height, width) or (height, width, 3), got {values.shape}")
    values = np.nan_to_num(values).clip(0, 255).astype(np.uint8)
    return values if values.ndim == 3 else np.repeat(values[:, :, None], 3, axis=2)


def _band(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures side by side."""
    padded = [np.pad(one, ((0, 0), (0, _GAP), (0, 0)), constant_values=255) for one in pictures]
    return np.concatenate(padded, axis=1)[:, :-_GAP]


def _lines(figure: Figure) -> Chart:
    """Named lines over an axis of the recipe's own."""
    title, x = clean(figure["title"]), np.asarray(figure["x"], dtype=np.float64)
    lines = {clean(name): np.asarray(values, dtype=np.float64) for name, values in figure["lines"].items()}
    for name, values in lines.items():
        if values.shape != x.shape or x.ndim != 1:
            raise ValueError(f"{name} has {values.shape} values at {x.shape} places")
    with drawing(NARROW, 280) as (canvas, save):
        axes = canvas.add_axes((58 / NARROW, 40 / 280, (NARROW - 68) / NARROW, 222 / 280))
        for values, color in zip(lines.values(), PALETTE * len(lines), strict=False):
            shown = drawable(Series(x, values))
            axes.plot(shown.steps, shown.values, color=color, marker="o", markersize=4.5, linewidth=1.2)
        every = np.concatenate([drawable(Series(x, values)).values for values in lines.values()] or [np.zeros(0)])
        value_ticks(axes, every, log=False, percent=bool(figure.get("percent", False)))
        axes.grid(axis="y")
        axes.set_xlabel(shorten(clean(figure["x_label"]), 60))
        svg = save(title)
    legend = tuple((name, color, "point") for name, color in zip(lines, PALETTE * len(lines), strict=False))
    return Chart(title, svg, clean(figure.get("caption", "")), legend=legend)


def _passages(figure: Figure) -> list[Passage]:
    """Texts with weights; the template escapes every word."""
    return [
        Passage(
            clean(passage["heading"]),
            tuple(
                (_share(weight), tuple((clean(word), _share(share)) for word, share in words))
                for weight, words in passage["lines"]
            ),
        )
        for passage in figure["passages"]
    ]


def _share(value: Any) -> float:
    return float(np.clip(np.nan_to_num(float(value)), 0, 1))
