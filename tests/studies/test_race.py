"""`tame race` as a user runs it: real processes, a real kill, real files."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

from tameformer.cli.__main__ import main
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.studies.cells import try_lock
from tameformer.studies.race import chosen, make_race
from tameformer.training import CheckpointFolder

PROBES = [f"--probes.{field.name}=null" for field in fields(ProbesConfig)]
TINY = [*PROBES, "--max_steps=8", "--num_train_epochs=null", "--model.dim=8", "--data.batch_size=96", "--loop.logging_steps=1",
        "--loop.eval_steps=4", "--checkpoint.best_metric=eval/accuracy", "--checkpoint.best_mode=max"]  # fmt: skip
RACE = ["vit-digits", *TINY, "--budget=2", "--share=0.5", "--jobs=2", "--output_dir=race"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read() -> dict:
    return json.loads(Path("race/race.json").read_text())


def kinds(name: str) -> list[str]:
    run = Path("race") / name
    return [event["kind"] for event in RunReader(run).events()] if (run / "log.jsonl").is_file() else []


def test_a_race_killed_and_resumed_ends_as_its_best_run_does_alone(capfd):
    command = [sys.executable, "-m", "tameformer.cli", "race", *RACE]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not any("pause" in kinds(run.name) for run in Path("race").glob("data_seed=*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    for run in Path("race").glob("data_seed=*"):
        while (lock := try_lock(run)) is None:
            time.sleep(0.05)
        os.close(lock)
    assert not Path("race/race.json").exists()

    assert main(["race", *RACE]) == 0
    out, _ = capfd.readouterr()
    assert "page: race/race.html" in out
    found = read()
    assert found["plan"] == {"starts": 3, "share": 0.5, "continued": 1, "cost": 2.0}
    assert found["spent"] == 2.0
    assert [(run["seed"], run["data_seed"]) for run in found["runs"]] == [(0, 0), (1, 1), (1, 0)]
    assert found["counts"] == {"finished": 1, "paused": 2}
    early = [run["early"] for run in found["runs"]]
    best = next(run for run in found["runs"] if run["state"] == "finished")
    assert best["early"] == max(early)
    assert best["folder"] == found["best"]["folder"]
    assert found["expected_best"]["early"][0] == pytest.approx(sum(early) / 3)
    assert Path("race", found["best"]["checkpoint"], "manifest.json").is_file()
    for run in found["runs"]:
        told = kinds(run["folder"])
        assert told.count("pause") == 1  # a run that had paused when the race was killed was not started again

    values = dict(word.removeprefix("--").split("=") for word in TINY)
    for key in ("seed", "data_seed"):
        values[key] = best[key]
    values = {key: None if value == "null" else value for key, value in values.items()}
    alone = train("vit-digits", overrides={**values, "loop.eval_on_start": True, "output_dir": "alone"})
    files = [
        json.loads((CheckpointFolder(Path(folder)).path(8) / "manifest.json").read_text())["files"]
        for folder in (f"race/{best['folder']}", "alone")
    ]
    assert files[0] == files[1]
    kept = int(Path("alone/BEST").read_text().removeprefix("step-"))
    assert best["final"] == next(
        line["eval/accuracy"]
        for line in RunReader(alone.folder).log()
        if line["step"] == kept and "eval/accuracy" in line
    )

    # Another share would be another race; a larger budget, and all to the end, is the same one.
    assert main(["race", *RACE, "--share=0.25"]) == 2
    assert "it is a race, judged at 0.5, and this one a race, judged at 0.25" in capfd.readouterr().err
    assert main(["race", *RACE, "--run_all"]) == 0
    found = read()
    assert found["counts"] == {"finished": 3}
    assert found["missed"] >= 0
    assert found["expected_best"]["as_far_as_run"][0] == pytest.approx(found["final"]["mean"]["mean"])
    page = Path("race/race.html").read_text()
    assert "Expected best evaluation accuracy of n runs" in page
    assert "what stopping early would have saved" in page
    assert "1 of 3 runs, 33 %" in page
    assert all(words in page for words in ("would be stopped", "the best", "judged"))
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_runs_that_diverge_are_counted_and_never_continued_also_through_a_database(capfd):
    storage = ["--storage=sqlite:///race.db"] if find_spec("optuna") else []
    rates = ["--optim.name=sgd", "--optim.max_grad_norm=null", "--optim.schedule=constant", "--optim.warmup_steps=0"]
    rates += ["--guard.max_skips=0", "--guard.max_rollbacks=0"]
    some = ["--vary=optim.peak_lr=0.01,1e18", "--starts=4", "--continue=1"]
    assert main(["race", *RACE, *rates, *some, *storage, "--budget=3"]) == 0
    assert Path("race.db").is_file() == bool(storage)
    found = read()
    assert found["counts"] == {"finished": 1, "paused": 1, "diverged": 2}
    assert [run["early"] for run in found["runs"] if run["variant"] == "1e+18"] == ["NaN", "NaN"]
    assert (found["failed"]["n"], found["failed"]["count"] >= 2) == (4, True)
    assert all(math.isfinite(value) for value in found["expected_best"]["early"])
    assert [one["variant"] for one in found["differences"]] == ["1e+18"]


def judged(folder: Path, value: float) -> None:
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text(json.dumps({"step": 4, "kind": "pause", "eval/loss": value}) + "\n")
    (folder / "log.jsonl").write_text(json.dumps({"step": 4, "eval/loss": value}) + "\n")


def test_the_best_go_on_whichever_way_is_better(tmp_path):
    values = [0.5, 0.3, 0.9, 0.3, 0.7]
    for metric, expected in ((None, [1, 3]), ("eval/loss", [1, 3])):
        race = make_race("vit-digits", ["--max_steps=8"], {}, budget=3, share=0.3, starts=5, continued=2, metric=metric)
        assert race.mode == "min"
        for cell, value in zip(race.cells, values, strict=True):
            if not (tmp_path / cell.name).exists():
                judged(tmp_path / cell.name, value)
        assert chosen(race, tmp_path) == [race.cells[place] for place in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit-digits"], "--budget is missing"),
        (["vit-digits", "--budget=1"], "a budget of 1 runs affords no such race"),
        (["vit-digits", "--budget=4", "--data_seed=3"], "data_seed is what a race sets itself"),
        (["vit-digits", "--budget=4", "--loop.pause_after=0.5"], "loop.pause_after is what a race sets itself"),
        (["vit-digits", "--budget=4", "--vary=seed=1,2"], "seed cannot be varied"),
        (["vit-digits", "--budget=4", "--metric=accuracy"], "did you mean eval/accuracy?"),
        (["vit-digit", "--budget=4"], "there is no recipe vit-digit; did you mean vit-digits?"),
        (["--budget=4"], "the recipe comes first"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(arguments, message, capsys):
    assert main(["race", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_help_has_examples(capsys):
    assert main(["race", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "tame race vit-digits --budget 4" in shown
