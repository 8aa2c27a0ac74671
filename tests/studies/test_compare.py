"""`tame compare` as a user runs it: real processes, real signals, real files."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from tameformer.cli.__main__ import main
from tameformer.recipes.config import ProbesConfig
from tameformer.record import RunReader
from tameformer.studies.cells import try_lock

# Nothing is measured inside the model here, which makes the runs' reports faster.
PROBES = [f"--probes.{field.name}=null" for field in fields(ProbesConfig)]
TINY = [
    *PROBES,
    "--max_steps=6",
    "--model.dim=16",
    "--data.batch_size=96",
    "--loop.logging_steps=1",
    "--seeds=1",
    "--jobs=2",
]
# Plain gradient descent without clipping: at this rate the first update already makes the loss NaN.
RATES = ["--optim.name=sgd", "--optim.max_grad_norm=null", "--optim.schedule=constant", "--optim.warmup_steps=0"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tameformer.cli", "compare", "vit-digits", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(ready, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in RunReader(folder).log() if "train/loss" in line]


def read(folder: str = "study") -> dict:
    return json.loads(Path(folder, "compare.json").read_text())


def is_free(folder: Path) -> bool:
    """Nobody works in a folder: the lock can be had."""
    lock = try_lock(folder)
    if lock is not None:
        os.close(lock)
    return lock is not None


def test_a_grid_with_a_rate_that_diverges_and_then_more_of_it(capfd):
    study = ["--vary=optim.peak_lr=0.01,1e18", "--vary=stabilize=none", *RATES, *TINY, "--output_dir=study"]
    assert main(["compare", "vit-digits", *study]) == 0
    out, err = capfd.readouterr()
    assert "sensitivity" in out
    assert "page: study/compare.html" in out
    assert "diverged, exit code 3: step" in err
    found = read()
    assert found["counts"] == {"finished": 1, "diverged": 1}
    assert found["initial_source"] == "eval/loss of the untrained model"
    good, bad = found["cells"]
    assert good["initial"] == bad["initial"]  # the rate changes nothing before the first step
    assert abs(good["initial"] - math.log(10)) < 1
    assert "the loss is nan" in bad["message"]
    # One rate is the best, the other one lost everything that it gained.
    gain = good["initial"] - good["metrics"]["eval/loss"]
    assert found["variants"][0]["sensitivity"]["mean"] == pytest.approx(gain / 2)
    assert found["variants"][0]["usable_rates"] == [0.01, 0.01]

    # Other values are another comparison; another one more is the same, and the old runs are read as they are.
    before = {path: path.stat().st_mtime_ns for path in Path("study").glob("*/log.jsonl")}
    assert main(["compare", "vit-digits", *(text.replace("=none", "=rezero") for text in study)]) == 2
    assert "stabilize had none, too" in capfd.readouterr().err
    grown = [text.replace("=none", "=none,layer_scale") for text in study]
    assert main(["compare", "vit-digits", *grown, "--metric=eval/accuracy"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [variant["name"] for variant in read()["variants"]] == ["none", "layer_scale"]
    assert (len(read()["cells"]), read()["metric"], read()["loss"]) == (4, "eval/accuracy", "eval/loss")
    assert main(["compare", "vit-digits", *grown, "--metric=eval/f1"]) == 2
    assert "--metric can be" in capfd.readouterr().err


def test_a_failing_cell_is_told_and_does_not_stop_the_rest(capfd):
    study = [
        *PROBES,
        "--vary=data.batch_size=5000,96",
        "--max_steps=4",
        "--model.dim=16",
        "--seeds=1",
        "--output_dir=study",
    ]
    assert main(["compare", "vit-digits", *study]) == 1
    out, _ = capfd.readouterr()
    assert "batch_size 5000 is larger than the data" in out
    assert read()["counts"] == {"failed": 1, "finished": 1}
    failed = Path("study/batch_size=5000,seed=0")
    ended = json.loads((failed / "exit.json").read_text())
    assert ended["exit_code"] == 1
    assert ended["message"].startswith("batch_size 5000 is larger than the data, which has 1437 samples")
    before = (failed / "exit.json").stat().st_mtime_ns
    assert main(["compare", "vit-digits", *study]) == 1
    assert (failed / "exit.json").stat().st_mtime_ns == before  # not tried again
    assert main(["compare", "vit-digits", *study, "--retry_failed"]) == 1
    assert (failed / "exit.json").stat().st_mtime_ns > before


LONG = [*PROBES, "--vary=model.dim=16,24", "--max_steps=2000", "--num_train_epochs=null", "--loop.logging_steps=1", "--seeds=1",
        "--jobs=1", "--loop.eval_steps=2000", "--checkpoint.every=5", "--output_dir=study"]  # fmt: skip


def test_ctrl_c_saves_the_runs_prints_what_there_is_and_says_how_to_go_on():
    process = start(*LONG)
    run = Path("study/dim=16,seed=0")
    wait_until(lambda: (run / "log.jsonl").is_file() and len(steps(run)) > 3, process)
    # Ctrl-C in a terminal reaches the whole process group; a run that heard it twice would not have saved.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "0 of 1" in out
    assert "the same command goes on from here" in err
    assert is_free(run)
    stopped = RunReader(run).events()[-1]
    assert stopped["kind"] == "stop"
    assert (run / "checkpoints" / f"step-{stopped['step']:06d}" / "manifest.json").is_file()
    assert not (run.parent / "dim=24,seed=0").exists()


def test_a_killed_comparison_leaves_no_run_behind_and_goes_on():
    process = start(*LONG)
    run = Path("study/dim=16,seed=0")
    wait_until(lambda: (run / "log.jsonl").is_file() and len(steps(run)) > 6, process)
    assert not is_free(run)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not is_free(run):  # the run sees that its parent is gone, saves and stops
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert RunReader(run).events()[-1]["kind"] == "stop"
    reached = steps(run)[-1]
    assert 6 < reached < 2000
    process = start(*LONG)
    wait_until(lambda: (run / "log.jsonl").is_file() and len(steps(run)) > reached + 3, process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    kinds = [event["kind"] for event in RunReader(run).events()]
    assert kinds.count("start") == 1
    assert "resume" in kinds
    told = steps(run)
    assert told == list(range(1, len(told) + 1))  # no step twice, none missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit-digits", "--vary=optim.peek_lr=1"], "unknown key optim.peek_lr; did you mean optim.peak_lr?"),
        (["vit-digits", "--vary=stabilize=none,admn"], "there is no method admn; did you mean admin?"),
        (["vit-digits", "--vary=model.dim=16,32", "--max_stebs=3"], "unknown key max_stebs; did you mean max_steps?"),
        (["vit-digit", "--vary=model.dim=16,32"], "there is no recipe vit-digit; did you mean vit-digits?"),
        (["vit-digits", "--vary=model.dim=16,32", "--seeds=none"], "--seeds expects how many"),
        (["vit-digits", "--vary=model.dim=16,32", "--jobs=0"], "jobs must be at least 1, got 0"),
        (["vit-digits", "--vary=model.dim=16,32", "--usable=1.5"], "got 1.5"),
        (["vit-digits", "--vary=model.dim=16,32", "--metric=accuracy"], "did you mean eval/accuracy?"),
        (["--vary=model.dim=16,32"], "the recipe comes first"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_help_has_examples(capsys):
    assert main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "tame compare vit-digits --vary" in shown
    for option in ("--vary", "--seeds", "--output_dir", "--jobs", "--metric", "--usable", "--retry_failed"):
        assert option in shown
