"""What every figure of the report is made with: a matplotlib figure in, safe inline SVG out; no file, no network."""

import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tameformer.report.read import clean

BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#00795c", "#a94f86"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, "#b07d00", "#3f9fd8", "#444444")  # Okabe-Ito, darkened to read on white
INK, MUTED, GRID, BROKEN = "#1f2933", "#5b6773", "#e3e7eb", "#c1121f"
PARTLY = "#ff9aa2"  # some of the heads behind a cell are not finite
WIDE = 720  # pixels across a drawing that spans the page, before it is scaled to it
NARROW = 520  # and across one that shares it with another

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


@contextmanager
def drawing(width: int, height: int) -> Iterator[tuple[Figure, Callable[[str], str]]]:
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
