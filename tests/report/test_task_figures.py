"""What recipes want to be seen is drawn as it was written, and nothing in it is taken for HTML."""

import json

import numpy as np

from run_folders import picture, write_run
from tameformer.record import write_figure
from tameformer.report import write_report
from tameformer.report.task_figures import task_figures

HOSTILE = "<script>alert(1)</script>\"'&$x^2$"
PAGE = {
    "images": {"kind": "images", "title": HOSTILE, "caption": HOSTILE,
               "rows": {"seen": [[[0, 255], [255, 0]], [[9, 9], [9, 9]]], HOSTILE: [[[50, 60], [70, 80]]]}},
    "lines": {"kind": "lines", "title": "By length", "caption": "", "x": [1, 2, 4], "x_label": HOSTILE,
              "lines": {"with": [0.5, None, 1.0], HOSTILE: [0.1, 0.2, 0.3]}, "percent": True},
    "text": {"kind": "passages", "title": "Attention", "caption": "",
             "passages": [{"heading": HOSTILE, "lines": [[0.75, [[HOSTILE, 1.0], ["good", 7.0]]]]}]},
}  # fmt: skip


def test_pictures_keep_their_picture():
    (chart,), _, remarks = task_figures({"images": PAGE["images"]})
    assert not remarks
    # Two rows of 2 x 2 pictures with a gap of two white pixels.
    expected = np.full((6, 6), 255)
    expected[:2, :2], expected[:2, 4:], expected[4:, :2] = [[0, 255], [255, 0]], 9, [[50, 60], [70, 80]]
    assert np.array_equal(picture(chart.svg), np.repeat(expected[:, :, None], 3, axis=2))


def test_everything_is_shown_and_escaped(tmp_path):
    folder = write_run(tmp_path / "run")
    for name, figure in PAGE.items():
        write_figure(folder, name, figure)
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<script>" not in html
    assert "<h2>The task</h2>" in html
    assert "<h3>By length</h3>" in html
    assert '<span style="--weight: 1.000">good</span>' in html  # clipped
    assert '<p style="--weight: 0.750">' in html
    assert html.count("&lt;script&gt;") >= 6


def test_a_figure_ends_no_run(tmp_path, caplog):
    """Neither NaN, which a model that diverged has everywhere, nor a folder that cannot be written."""
    folder = write_run(tmp_path / "run")
    nan = float("nan")
    words = [{"heading": "Document 0", "lines": [[nan, [["good", nan]]]]}]
    write_figure(folder, "text", {**PAGE["text"], "passages": words})
    write_figure(folder, "lines", {**PAGE["lines"], "lines": {"with": [0.5, nan, None]}})
    assert '"NaN"' in (folder / "figures" / "text.json").read_text(encoding="utf-8")
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<h3>By length</h3>" in html
    assert '<span style="--weight: 0.000">good</span>' in html
    (tmp_path / "file").write_text("")
    write_figure(tmp_path / "file", "lines", PAGE["lines"])
    assert "the figure lines was not written" in caplog.text


def test_what_cannot_be_drawn_is_told_and_the_rest_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    write_figure(folder, "lines", PAGE["lines"])
    write_figure(folder, "short", {**PAGE["lines"], "x": [1]})
    write_figure(folder, "new", {"kind": "hologram"})
    write_figure(folder, "flat", {**PAGE["images"], "rows": {"seen": [[1, 2]]}})
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<h3>By length</h3>" in html
    for told in ("short cannot be drawn", "new cannot be drawn", "hologram", "flat cannot be drawn"):
        assert told in html
    (folder / "figures" / "torn.json").write_text(json.dumps({"kind": "lines"})[:5])
    assert "figures could not be read" in write_report(folder).read_text(encoding="utf-8")
