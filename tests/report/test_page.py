import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

from run_folders import picture, write_run
from tameformer.cli.report import main
from tameformer.errors import RecordError
from tameformer.record import RunWriter
from tameformer.report import write_comparison, write_report
from tameformer.report.axes import BUCKETS, thin
from tameformer.report.heat_map import heat_map
from tameformer.report.read import Probe, Series, share_of

viridis = colormaps["viridis"]
HOSTILE = "<script>alert(1)<img src=x onerror=alert(2)>\"'&$x^2$\u8bed"


class Page(HTMLParser):
    """Tags, attributes and texts of a page, by the rules a browser follows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.texts += [data.strip()] if data.strip() else []


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def headings(html: str) -> list[str]:
    return re.findall(r"<figure[^>]*>\s*<h3>(.*?)</h3>", html)


def test_a_finished_run_shows_every_figure_number_and_text(tmp_path):
    path = write_report(write_run(tmp_path / "digits"))
    html = path.read_text(encoding="utf-8")
    assert path == tmp_path / "digits" / "report.html"
    assert headings(html) == [
        "Loss", "Evaluation accuracy", "Learning rate", "Gradient norm", "Throughput, samples/s",
        "Attention entropy, mean over heads, nats", "Attention entropy, share of its ceiling, mean over heads",
        "Attention entropy, nats, by head", "Time line",
    ]  # fmt: skip
    texts = page_of(path).texts
    for expected in (
        "digits",
        "Finished at step 400.",
        "97.78 %",
        "97.20 %",
        "share of steps clipped",
        "optim:",
        "git.commit",
    ):
        assert any(expected in text for text in texts), expected
    assert html.count("<svg") == html.count('role="img"') == html.count("aria-label") == 9
    assert "encoder.blocks.*.attention" in html
    assert html.count("<title>Learning rate</title>") == 1
    assert re.search(r"<text[^>]*>step</text>", html)  # text stays text
    assert len(html) < 150_000


def test_shares_of_any_size_are_in_per_cent_on_a_linear_axis(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step, share in ((500, 0.004), (1000, 0.037), (2000, 0.366)):
        writer.log(step, {"train/loss": 1.0, "eval/accuracy_longer": share, "eval/wer": 1.2 - share})
    writer.close()
    html = write_report(tmp_path / "run").read_text()
    assert {"Evaluation accuracy, longer strings", "Evaluation WER"} < set(headings(html))
    assert re.search(r"<text[^>]*>\d\d %</text>", html)
    assert "Logarithmic axis." not in html


def test_a_half_finished_run_says_so_and_names_the_collapsed_head(tmp_path):
    folder = write_run(tmp_path / "run", steps=230, ending=None, collapse=(2, 1, 120))
    html = write_report(folder).read_text()
    assert "Not finished: still running, or killed. The last record is of step 230 of 230." in html
    assert "encoder.blocks.2.attention, head 1 is below a tenth of its ceiling since step 120" in html
    lowest = re.search(r"Lowest attention entropy.*?<tbody>\s*<tr>(.*?)</tr>", html, re.S)
    assert lowest is not None
    assert re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", lowest[1]) == [
        "encoder.blocks.2.attention",
        "1",
        "0.1133",
        "4.0 %",
        "230",
    ]


def test_a_diverged_run_marks_and_counts_what_is_not_finite(tmp_path):
    html = write_report(write_run(tmp_path / "run", nan_from=260, ending="stop")).read_text()
    assert "Diverged: the loss is not finite since step 260; it was stopped at step 400." in html
    assert html.count("not finite: 15, first at step 260") == 2  # loss and gradient norm
    assert "not finite: 60, first at step 260" in html  # 15 steps of 4 layers
    assert "not finite: 240<" in html  # 15 steps of 16 heads
    assert "nan" not in re.sub(r"<[^>]*>|finance", "", html).split()


def test_only_non_finite_losses_still_make_a_page(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step in range(3):
        writer.log(step, {"train/loss": math.nan, "train/grad_norm": math.inf, "eval/loss": math.nan})
        writer.probe(step, {"diag/attention_entropy/a/0": math.nan, "diag/attention_entropy_max/a": math.nan})
    writer.close()
    html = write_report(tmp_path / "run").read_text()
    assert "Diverged: the loss is not finite since step 0." in html
    assert "never finite" in html


@pytest.mark.parametrize("content", ["", '{"step": 0, "tr', '{"step": 0}\n', '{"step": 0, "train/loss": 1.5}\n'])
def test_the_barest_run_folders_make_a_page(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.jsonl").write_text(content)
    for name in ("probes.jsonl", "events.jsonl", "config.yaml", "env.json"):
        (folder / name).write_text("")
    html = write_report(folder).read_text()
    assert ("The last record is of step 0" if "train/loss" in content else "Nothing has been logged yet.") in html
    assert html.count("<svg") == ("train/loss" in content)
    assert "env.json could not be read and is left out" in html
    (folder / "env.json").unlink()
    assert "could not be read" not in write_report(folder).read_text()


def test_values_of_any_size_are_drawn_or_marked(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step, value in enumerate([1e308, -1e308, 5e-324, 0.0, 1.0, -3.0]):
        writer.log(step, {"train/loss": value, "train/grad_norm": value, "train/lr": 0.0, "train/extra": value})
        writer.probe(
            step, {"diag/norm/a/0": value, "diag/norm/a/1": -value, "diag/flat/a/0": 1.0, "diag/lines/a": value}
        )
    writer.close()
    html = write_report(tmp_path / "run").read_text()
    assert "not finite or beyond 1e+30: 2, first at step 0" in html
    assert headings(html)[-5:] == [
        "Norm, mean over heads", "Norm, by head", "Flat, mean over heads", "Flat, by head", "Lines",
    ]  # fmt: skip


def test_every_probe_has_a_map_with_lines_beside_it_for_few_layers_and_panels_for_heads(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step in (0, 7, 50):  # uneven
        writer.log(step, {"train/loss": 1.0})
        few = {f"diag/update_ratio/layers.{layer}.mlp": 0.1 * layer for layer in range(3)}
        many = {f"diag/weight_norm/layers.{layer}.mlp": 0.1 * layer for layer in range(9)}
        writer.probe(step, {**few, **many, "diag/logit_max/layers.0/0": 4.0 + step})
    writer.close()
    html = write_report(tmp_path / "run").read_text()
    figures = dict(zip(headings(html), re.findall(r"<figure.*?</figure>", html, re.S), strict=True))
    assert {name: "<image" in figure for name, figure in figures.items() if name != "Loss"} == {
        "Update to weight ratio": False, "Update to weight ratio, by layer": True,  # few layers: both
        "Weight norm, by layer": True, "Logit max, mean over heads": True, "Logit max, by head": False,
    }  # fmt: skip
    assert list(figures)[1] == "Update to weight ratio"  # known ones first, in the table's order


def test_everything_from_the_run_is_escaped(tmp_path):
    folder = write_run(tmp_path / "<b>run", layer_name=HOSTILE + "{}", layers=2, heads=2, nan_steps=(20,))
    writer = RunWriter(folder, resume_step=400)
    writer.event(400, HOSTILE, HOSTILE)
    writer.event(400, "break out", "</title></style></script></svg>" + HOSTILE)
    writer.log(400, {f"train/{HOSTILE}": 1.0, f"eval/{HOSTILE}": 1.0, f"test/{HOSTILE}": 1.0})
    writer.probe(400, {f"diag/{HOSTILE}/{HOSTILE}": 1.0})
    writer.close()
    (folder / "config.yaml").write_text(f"name: |\n  {HOSTILE}</pre></details>\n")
    (folder / "env.json").write_text(json.dumps({"command": ["tame", HOSTILE], HOSTILE: {HOSTILE: HOSTILE}}))
    for path in (write_report(folder), write_comparison([folder, folder], tmp_path / "both.html")):
        html, page = path.read_text(encoding="utf-8"), page_of(path)
        assert "<script" not in html.lower()
        assert not {"script", "img", "b"} & set(page.tags)
        assert any(HOSTILE in text for text in page.texts)
        assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_nothing_outside_the_file_is_referred_to(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    for tag, name, value in page_of(path).attributes:
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
        assert "url(" not in value or "url(#" in value
    assert not re.search(r"https?://|@import|//[a-z]+\.", path.read_text().split("<body>")[0])


def test_links_inside_the_drawings_meet_exactly_one_target(tmp_path):
    attributes = page_of(write_report(write_run(tmp_path / "run", layers=12, heads=12))).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    links = {
        link
        for _, name, value in attributes
        if name in ("href", "clip-path")
        for link in re.findall(r"#([\w-]+)", value)
    }
    assert links
    assert links == set(ids)
    assert len(ids) == len(set(ids))


def test_a_large_run_stays_small_and_says_what_was_thinned(tmp_path):
    folder = write_run(
        tmp_path / "run", steps=30_000, every=100, layers=48, heads=16, text=True, collapse=(30, 7, 20_000)
    )
    assert seconds_in_a_fresh_process(folder) < 8.0
    html = (folder / "report.html").read_text()
    assert len(html) < 400_000
    assert "Where several measurements fall into one cell, the lowest is drawn." in html
    assert "encoder.blocks.30.attention, head 7 is below a tenth" in html


def test_the_same_run_gives_the_same_bytes(tmp_path):
    folder = write_run(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()


def test_a_comparison_overlays_curves_and_lists_results_and_differing_settings(tmp_path):
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", layers=2, seed=1, nan_from=260, ending="stop")]
    html = write_comparison(folders, tmp_path / "out.html").read_text()
    rows = {
        row[0]: row[1:]
        for row in (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", tr) for tr in re.findall(r"<tr>(.*?)</tr>", html, re.S))
    }
    assert rows[""] == ["a", "b"]
    assert rows["State"] == [
        "Finished at step 400.",
        "Diverged: the loss is not finite since step 260; it was stopped at step 400.",
    ]
    assert rows["Test accuracy"] == ["97.20 %", ""]
    assert (rows["model.num_layers"], rows["seed"]) == (["4", "2"], ["0", "1"])
    assert "optim.peak_lr" not in rows
    assert headings(html)[:3] == ["Training loss", "Evaluation loss", "Evaluation accuracy"]
    assert html.count("stroke: #0072b2") > 5
    assert html.count("stroke: #d55e00") > 5


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / parent / "run", steps=20) for parent in ("x", "y")]
    html = write_comparison([*folders, folders[0]], tmp_path / "out.html").read_text()
    assert all(f">{name}</th>" in html for name in ("x/run (1)", "y/run", "x/run (2)"))
    with pytest.raises(ValueError, match="at least one run folder, got none"):
        write_comparison([], tmp_path / "none.html")


def test_a_folder_without_a_run_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(RecordError, match=r"holds no run: expected a file log.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_prints_and_exits_by_the_rules(tmp_path, capsys):
    folder = write_run(tmp_path / "a", steps=20)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main([str(folder), str(folder), "--out", str(tmp_path / "c.html")]) == 0
    assert (tmp_path / "c.html").is_file()
    assert main([str(tmp_path)]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert main([str(folder), "--out", str(tmp_path / "no" / "c.html")]) == 2
    assert f"there is no folder {tmp_path / 'no'}; create it" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--colour", str(folder)]) == 2
    assert main(["--help"]) == 0
    assert "tame report runs/a runs/b" in capsys.readouterr().out


def seconds_in_a_fresh_process(folder: Path) -> float:
    """Processor seconds from a bare interpreter to the written report, without the tests' type checks."""
    code = "import sys, time; from tameformer.cli.report import main; main(sys.argv[1:]); print(time.process_time())"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def test_a_two_minute_run_takes_less_than_three_processor_seconds(tmp_path):
    folder = write_run(tmp_path / "run", steps=20_000, every=40, layers=6, heads=8)
    assert seconds_in_a_fresh_process(folder) < 3.0


WRAPPER = """<!doctype html><body><iframe id="page" style="border:0;width:{width}px;height:4000px"></iframe><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument, wide = [];
  for (const element of page.querySelectorAll("body *")) {{
    const box = element.getBoundingClientRect(), scroll = element.closest(".scroll");
    if (!scroll && box.right > {width} + 0.5) wide.push(element.tagName + "." + element.className);
  }}
  const svgs = [...page.querySelectorAll("figure svg")];
  const drawn = svgs.filter(svg => svg.getBoundingClientRect().height > 60).length;
  const result = {{page: page.documentElement.scrollWidth, wide, svgs: svgs.length, drawn,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .map(entry => entry.name).filter(name => !name.startsWith("data:")),
    texts: svgs.flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {{
      const a = text.getBoundingClientRect(), b = svg.getBoundingClientRect();
      return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }}).map(text => text.textContent))}};
  document.body.innerHTML = "<pre id=result>" + JSON.stringify(result).replaceAll("<", "&lt;") + "</pre>";
}};
frame.srcdoc = {page};
</script></body>"""


@pytest.fixture(scope="module")
def crowded_page(tmp_path_factory):
    """A page with long names and texts and all its details open."""
    folder = tmp_path_factory.mktemp("runs") / ("a_very_long_run_name_without_any_space" * 3)
    write_run(folder, layers=12, heads=4, nan_steps=(50,))
    writer = RunWriter(folder, resume_step=400)
    writer.event(400, "stop_with_a_kind_that_is_very_long_indeed", "word" * 80)
    writer.close()
    (folder / "config.yaml").write_text("key: " + "x" * 400)
    return write_report(folder).read_text().replace("<details", "<details open")


@pytest.mark.parametrize("width", [1280, 700, 400])
def test_in_a_browser_figures_are_there_and_nothing_overflows(tmp_path, crowded_page, width):
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine to look at the page with")
    wrapper = tmp_path / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=json.dumps(crowded_page).replace("</", "<\\/")))
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width + 40},1000", "--virtual-time-budget=4000", "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stderr[-2000:]
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert result["svgs"] == result["drawn"] == 9
    assert result["page"] <= width
    assert result["wide"] == []
    assert result["texts"] == []
    assert result["requests"] == []


def test_thinning_keeps_the_extremes_and_the_ends():
    values = np.random.default_rng(0).normal(size=20_000)
    values[777], values[12_345] = 50.0, -50.0
    few = thin(Series(np.arange(20_000), values))
    assert len(few) <= 2 * BUCKETS + 2
    assert {0, 777, 12_345, 19_999} <= set(few.steps.tolist())
    np.testing.assert_array_equal(few.values, values[few.steps])


def probe_of(values: np.ndarray, measured: np.ndarray | None = None) -> Probe:
    rows = tuple(("layer", head) for head in range(len(values)))
    steps = np.arange(values.shape[1]) * 10
    return Probe("p", rows, steps, values, np.ones(values.shape, dtype=bool) if measured is None else measured)


def test_heat_map_colours_are_viridis_of_the_share_with_red_and_grey_for_no_value():
    values = np.array([[0.0, 1.0, 2.0, math.nan], [0.5, math.inf, 2.0, 0.0]])
    ceiling = np.array([[2.0, 2.0, 2.0, 2.0], [2.0, 2.0, 0.0, math.nan]])
    chart = heat_map("t", share_of(probe_of(values), ceiling), last_step=30, share=True)
    red, grey = (193, 18, 31), (233, 236, 239)
    dark, middle, bright = [tuple(int(255 * x + 0.5) for x in viridis(share)[:3]) for share in (0.0, 32 / 63, 1.0)]
    quarter = tuple(int(255 * x + 0.5) for x in viridis(16 / 63)[:3])
    expected = np.array([[dark, middle, bright, red], [quarter, red, grey, grey]])
    np.testing.assert_allclose(picture(chart.svg), expected, atol=1)
    assert [text for text, _, _ in chart.legend] == [
        "not finite: 2, first at step 10",
        "not measured, or without a ceiling",
    ]


def test_of_many_measurements_and_heads_the_lowest_stays_visible():
    values = np.ones((3000, 1000))
    values[1234, 567] = 0.01
    values[77, 8] = math.nan
    chart = heat_map("t", probe_of(values), last_step=9990, share=True, keep="lowest")
    shown = picture(chart.svg)
    assert shown.shape[:2] == (1000, 80)
    assert [tuple(place) for place in np.argwhere(shown[:, :, 0] == 193)] == [(77 // 3, int(8.5 / 1000 * 80))]
    dark = np.argwhere((shown < 100).all(axis=2))
    assert [tuple(place) for place in dark] == [(1234 // 3, int(567.5 / 1000 * 80))]
    assert "Where several measurements fall into one cell, the lowest is drawn." in chart.caption


def test_thousands_of_events_and_evaluations_do_not_make_a_giant_page(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step in range(3000):
        writer.log(step, {"eval/loss": 1.0 + step})
        writer.event(step, ("skip", "rollback")[step % 2], "a sentence")
    writer.close()
    html = write_report(tmp_path / "run").read_text()
    assert html.count("2,600 rows are left out here") == 2
    assert len(html) < 300_000
