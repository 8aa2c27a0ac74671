"""From run folders to numbers, tables, files and the page."""

import csv
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tameformer.errors import ConfigError, RecordError
from tameformer.record import RunWriter
from tameformer.studies.cells import EXIT, position, read_cell, state_of, try_lock, write_exit
from tameformer.studies.grid import Cell, Choice, Factor, Grid
from tameformer.studies.page import write_page
from tameformer.studies.results import read_results
from tameformer.studies.statistics import Interval
from tameformer.studies.tables import (
    difference_table,
    rate_table,
    reading,
    result_table,
    trouble_table,
    with_interval,
)
from tameformer.studies.write import write_results

NAN = math.nan


def a_grid(rates=(0.001, 0.01, 0.1), methods=("none", "qk_norm"), seeds=(0, 1)) -> Grid:
    factors = [Factor("stabilize", tuple(Choice(name, name) for name in methods))]
    if rates:
        factors.insert(0, Factor("optim.peak_lr", tuple(Choice(f"{rate:g}", str(rate), rate) for rate in rates)))
    return Grid("vit-digits", ("--max_steps=40",), tuple(factors), tuple(seeds))


def write_run(folder: Path, losses: dict[int, float], *, exit_code: int | None = 0, message: str = "", **more: float):
    """A run whose evaluation loss at each step is given; NaN is the step at which training diverged."""
    writer = RunWriter(folder)
    writer.event(0, "start", "starts", max_steps=40)
    for step, loss in losses.items():
        if step:
            writer.log(step, {"train/loss": loss})
        if math.isfinite(loss):
            writer.log(step, {"eval/loss": loss, **more})
    if exit_code == 0:
        writer.event(max(losses), "finish", "finished")
    elif exit_code == 3:
        writer.event(max(losses), "diverged", message)
    writer.close()
    if exit_code is not None:
        write_exit(folder, exit_code, message)


@pytest.fixture
def fill(tmp_path) -> Callable[..., Path]:
    def fill_folder(grid: Grid, loss: Callable[[Cell], float | None], initial: float = 2.0) -> Path:
        for cell in grid.cells:
            final = loss(cell)
            if final is None:
                continue
            code, message = (
                (0, "") if math.isfinite(final) else (3, "step 40: the loss is nan; the last checkpoint ...")
            )
            accuracy = {"eval/accuracy": 1 - final / 4} if math.isfinite(final) else {}
            middle = 1.5 if math.isfinite(final) else 3.5
            write_run(
                tmp_path / cell.name, {0: initial, 20: middle, 40: final}, exit_code=code, message=message, **accuracy
            )
        return tmp_path

    return fill_folder


FINAL = {  # method, rate -> final loss of seeds 0 and 1; the start is 2
    ("none", "0.001"): (1.0, 1.1),
    ("none", "0.01"): (0.5, 0.7),
    ("none", "0.1"): (NAN, 7.0),
    ("qk_norm", "0.001"): (1.0, 1.3),
    ("qk_norm", "0.01"): (0.6, 0.9),
    ("qk_norm", "0.1"): (0.6, 0.8),
}


def final(cell) -> float:
    rate, method = (choice.label for choice in cell.choices)
    return FINAL[method, rate][cell.seed]


@pytest.fixture
def results(fill):
    return read_results(fill(a_grid(), final), a_grid())


def test_sensitivity_and_usable_rates_by_hand(results):
    none, qk_norm = results.variants
    # Seed 0: (0.5 + 0 + 1.5) / 3; seed 1: (0.4 + 0 + 1.3) / 3, its 7 counting as 2.
    assert none.sensitivity.mean == pytest.approx((2 / 3 + 1.7 / 3) / 2)
    assert none.sensitivity.n == 2
    assert qk_norm.sensitivity.mean == pytest.approx((0.4 / 3 + 0.6 / 3) / 2)
    assert none.mean_losses == pytest.approx([1.05, 0.6, 2.0])
    assert none.usable == (0.01, 0.01)  # up to 0.6 + 0.1 * 1.4
    assert qk_norm.usable == (0.01, 0.1)
    assert qk_norm.highest_to(none) == pytest.approx(10)
    assert qk_norm.width_to(none) == pytest.approx(10)
    assert none.best == 1
    assert qk_norm.best == 2
    wide = read_results(results.folder, results.grid, tolerance=0.4)
    assert wide.variants[0].usable == (0.001, 0.01)


def test_means_are_of_finished_runs_and_diverged_ones_are_counted(results):
    row = results.variants[0].rows[2]
    assert (row.count("finished"), row.count("diverged")) == (1, 1)
    assert row.metric("eval/loss") == Interval(7.0, None, 1)
    assert results.counts() == {"finished": 11, "diverged": 1}
    assert results.variants[0].rows[0].metric("eval/loss").mean == pytest.approx(1.05)
    assert result_table(results, results.metrics).rows[2][:2] == ("0.1", "none")
    assert result_table(results, results.metrics).rows[2][-2:] == ("1 of 2", "1")


def test_differences_are_paired_by_seed(results):
    found = {(one.variant, one.rate and one.rate.label): one.difference for one in results.differences}
    assert found["qk_norm", "0.01"].mean == pytest.approx(0.15)
    # Of 0.1 and 0.2: s = 0.0707, t = 12.706, over the root of 2
    assert found["qk_norm", "0.01"].half_width == pytest.approx(12.706 * 0.05, rel=1e-4)
    assert found["qk_norm", "0.1"].n == 1  # seed 0 of the baseline diverged
    assert found["qk_norm", None].mean == pytest.approx((0.1 + 0.1) / 2)  # 0.1 against 0.01: each at its best


def test_a_metric_for_which_higher_is_better(results):
    found = read_results(results.folder, results.grid, metric="eval/accuracy")
    assert found.loss == "eval/loss"
    assert found.variants[0].sensitivity == results.variants[0].sensitivity
    assert found.differences[1].difference.mean == pytest.approx(-0.15 / 4)
    assert reading("eval/accuracy", Interval(-0.1, 0.05, 3)) == "worse"


def test_a_metric_that_nobody_measured_is_refused_with_those_there_are(results):
    with pytest.raises(ConfigError, match=r"no run measured eval/bleu; --metric can be .*eval/loss, eval/accuracy"):
        read_results(results.folder, results.grid, metric="eval/bleu")


def test_a_comparison_that_is_half_done(fill, tmp_path):
    folder = fill(a_grid(), lambda cell: None if cell.seed == 1 or cell.choices[0].label == "0.1" else 1.0)
    write_run(tmp_path / a_grid().cells[-1].name, {0: 2.0, 5: 1.9}, exit_code=None)
    results = read_results(folder, a_grid())
    assert results.counts() == {"finished": 4, "waiting": 7, "interrupted": 1}
    assert results.variants[0].sensitivity is None  # no seed has its whole grid
    assert results.variants[0].mean_losses == [None, None, None]
    assert len(trouble_table(results).rows) == 8
    write_results(results)
    html = write_page(results, "page.html").read_text()
    assert "4 of 12 runs have ended" in html


def test_nothing_at_all_makes_a_page(tmp_path):
    results = read_results(tmp_path, a_grid())
    write_results(results)
    assert "0 of 12 runs have ended" in write_page(results, "page.html").read_text()


def test_all_diverged(fill):
    results = read_results(fill(a_grid(), lambda cell: NAN), a_grid())
    assert results.variants[0].usable is None
    assert results.variants[0].sensitivity.mean == 0
    assert rate_table(results).rows[0][5] == "none"
    assert difference_table(results).rows[0][-1] == "no pair finished"
    assert "12 diverged" in write_page(results, "page.html").read_text()


def test_a_finished_run_whose_loss_is_no_number_has_diverged(tmp_path):
    grid = a_grid(rates=(), methods=("none", "qk_norm"), seeds=(0,))
    writer = RunWriter(tmp_path / grid.cells[0].name)
    writer.log(0, {"eval/loss": 2.0})
    writer.log(4, {"eval/loss": NAN})
    writer.event(4, "finish", "finished")
    writer.close()
    assert read_results(tmp_path, grid).counts() == {"diverged": 1, "waiting": 1}


def test_without_a_rate_there_is_no_rate_table(fill):
    grid = a_grid(rates=())
    results = read_results(fill(grid, lambda cell: 0.5 + cell.seed / 10 + (cell.choices[0].label == "none")), grid)
    assert rate_table(results).rows == ()
    assert [row[-1] for row in difference_table(results).rows] == ["better"]  # the same difference for both seeds
    assert results.differences[0].difference.mean == pytest.approx(-1)
    assert "peak learning rate" not in write_page(results, "page.html").read_text()


def test_a_loss_that_was_not_measured_before_training_is_said_to_be_late(results):
    found = read_results(results.folder, results.grid, metric="train/loss")
    assert found.initial_source == "first train/loss in the log, at step 20: the model had been trained that long"
    assert results.initial_source == "eval/loss of the untrained model"


def test_the_files_hold_every_number(results):
    json_path, csv_path = write_results(results)
    held = json.loads(json_path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert held["variants"][1]["usable_rates"] == [0.01, 0.1]
    assert held["variants"][1]["sensitivity"]["mean"] == results.variants[1].sensitivity.mean
    assert held["rows"][0]["metrics"]["eval/loss"]["half_width"] == results.rows[0].metric("eval/loss").half_width
    diverged = next(cell for cell in held["cells"] if cell["state"] == "diverged")
    assert diverged["metrics"]["eval/loss"] == "NaN"
    assert diverged["initial"] == 2.0
    assert diverged["values"] == {"optim.peak_lr": 0.1, "stabilize": "none"}
    lines = list(csv.DictReader(csv_path.read_text().splitlines()))
    assert len(lines) == 12
    assert [line["eval/loss"] for line in lines[:2]] == ["1.0", "1.0"]
    assert lines[4]["message"].startswith("step 40")


def test_every_key_of_the_file_is_documented(results):
    held = json.loads(write_results(results)[0].read_text())
    text = (Path(__file__).resolve().parents[2] / "docs/compare.md").read_text(encoding="utf-8")
    keys = {*held, *held["rows"][0], *held["variants"][0], *held["differences"][0], *held["cells"][0]} - {"name"}
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


def test_the_page_is_one_safe_file(fill):
    nasty = '<script>alert("x")</script>&amp;'
    factors = (Factor("data.path", (Choice("plain", "plain"), Choice(nasty, nasty))),)
    grid = Grid(f"{nasty}.yaml", (f"--x={nasty}",), factors, (0, 1))
    results = read_results(fill(grid, lambda cell: 0.5 + cell.seed / 10), grid)
    html = write_page(results, "page.html").read_text()
    assert "<script" not in html.replace("&lt;script", "")
    assert "&lt;script&gt;" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "src=" not in html


def test_the_page_shows_what_the_tables_say(results):
    html = write_page(results, "page.html").read_text()
    for text in ("Evaluation loss against learning rate", "peak learning rate", "1 of 12 runs diverged",
                 "0.01 to 0.1 or higher",
                 "10\u00d7", "0.01 only", "before training", "each at its best", "Wortsman"):  # fmt: skip
        assert text in html, text


@pytest.mark.parametrize(
    ("key", "found", "text"),
    [
        ("eval/loss", Interval(2.3054, 0.000075, 3), "2.305400 ± 0.000075"),
        ("eval/loss", Interval(0.61, 1.16, 3), "0.610 ± 1.160"),
        ("eval/loss", Interval(12345.6, 234.0, 3), "12346 ± 234"),
        ("eval/loss", Interval(-0.5, 0.0, 3), "\u22120.5"),
        ("eval/accuracy", Interval(0.9806, 0.0123, 3), "98.1 ± 1.2 %"),
        ("eval/accuracy", Interval(3.7e-17, 0.0183, 3), "0.000 ± 1.830 %"),
        ("eval/loss", None, "\u2013"),
    ],
)
def test_intervals_as_people_write_them(key, found, text):
    assert with_interval(key, found) == text


def test_what_the_end_of_a_run_means(tmp_path):
    assert state_of(tmp_path / "absent") == ("waiting", "")
    for name, losses, code, state in (
        ("done", {0: 2.0, 4: 1.0}, 0, "finished"),
        ("broke", {0: 2.0, 4: NAN}, 3, "diverged"),
        ("killed", {0: 2.0, 4: 1.0}, None, "interrupted"),  # the power went: nobody wrote an answer
        ("stopped", {0: 2.0, 4: 1.0}, 143, "interrupted"),
        ("ended by a signal", {0: 2.0, 4: 1.0}, -9, "interrupted"),
        ("wrong", {0: 2.0}, 1, "failed"),
    ):
        write_run(tmp_path / name, losses, exit_code=code, message="why")
        assert state_of(tmp_path / name)[0] == state, name
    (tmp_path / "broke" / EXIT).unlink()
    assert state_of(tmp_path / "broke") == ("diverged", "why")  # its own last event says so
    write_exit(tmp_path / "done", -9, "")  # killed while it wrote the report, after the end
    assert state_of(tmp_path / "done") == ("finished", "")
    (tmp_path / "early").mkdir()
    write_exit(tmp_path / "early", 2, "bad value")
    assert state_of(tmp_path / "early") == ("failed", "bad value")
    (tmp_path / "early" / EXIT).write_text("{")
    with pytest.raises(RecordError, match=r"exit.json is damaged .* remove it"):
        state_of(tmp_path / "early")


def test_the_position_of_a_run_comes_from_the_end_of_a_log_of_any_length(tmp_path):
    writer = RunWriter(tmp_path / "run")
    for step in range(1, 4000):
        writer.log(step, {"train/loss": 1 / step, "train/grad_norm": 1.0})
    writer.log(4000, {"eval/loss": 1.0})
    writer.close()
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write('{"step": 4001, "train/lo')
    assert position(tmp_path / "run") == (4000, 1 / 3999)
    assert position(tmp_path / "absent") == (0, None)


def test_a_lock_is_one_holder_s(tmp_path):
    lock = try_lock(tmp_path / "cell")
    assert lock is not None
    assert try_lock(tmp_path / "cell") is None
    os.close(lock)
    again = try_lock(tmp_path / "cell")
    assert again is not None
    os.close(again)


def test_reading_a_cell_keeps_first_and_last(tmp_path):
    write_run(tmp_path / "run", {0: 2.0, 10: 1.5, 20: 1.0})
    found = read_cell(tmp_path / "run")
    assert (found.first["eval/loss"], found.last["eval/loss"], found.step) == ((0, 2.0), 1.0, 20)
    assert found.first["train/loss"] == (10, 1.5)
