"""The same faults in the Hugging Face Trainer, without and with our guard, and in `tame train`: what each leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "trainer_faults.py"


def found(folder, *words) -> dict:
    answer = subprocess.run(
        [sys.executable, SCRIPT, f"--output={folder}", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads((folder / "trainer_faults.json").read_text())["raw"]


def check(raw: dict) -> None:
    clean, spoilt = raw["faults"]["no fault"], raw["faults"]["one batch of NaN, at 80"]
    assert all(each["finite"] and each["accuracy"] > 0.5 for each in clean.values())
    assert clean["hf"]["accuracy"] == clean["hf+tame"]["accuracy"]  # the guard changes nothing where nothing is wrong
    assert spoilt["hf"] == {**spoilt["hf"], "exit": 0, "finite": False, "loss": 0.0}  # what it has to be compared with
    for trainer in ("hf+tame", "tame"):
        assert spoilt[trainer]["events"] == {"step_skipped": 1}
        assert spoilt[trainer]["finite"]
        assert spoilt[trainer]["accuracy"] > clean[trainer]["accuracy"] - 0.1
    corrupt = raw["faults"]["one flipped bit in the newest checkpoint, then a resume"]["tame"]
    assert corrupt["began"] < corrupt["corrupt"]
    assert all(each == {"exit": 0, "began": 25} for each in raw["kills"]["tame"])


def test_the_document_shows_what_was_recorded():
    """`python benchmarks/trainer_faults.py` writes the tables; they are copied between the marks in the document."""
    document = (SCRIPT.parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    shown = document.partition("<!-- trainer_faults -->")[2].partition("<!-- trainer_faults end -->")[0]
    recorded = json.loads((SCRIPT.parent / "results" / "trainer_faults.json").read_text(encoding="utf-8"))
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")
    ]
    expected = [row for table in recorded["tables"] for row in (table["head"], *table["rows"])]
    assert [row for row in cells if set(row[0]) != {"-"}] == expected


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_fault_and_one_kill(tmp_path):
    check(found(tmp_path, "--quick"))


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_all_faults(tmp_path):
    raw = found(tmp_path, "--kills=10")
    check(raw)
    faults = raw["faults"]
    for fault in ("an infinite gradient, at 80", "outputs x1000 in one batch, at 80"):
        assert all(faults[fault][trainer]["finite"] for trainer in ("hf+tame", "tame"))
    assert faults["batches of NaN from 80 on"]["hf+tame"]["exit"] == 1  # the script ends with a DivergedError
    assert faults["batches of NaN from 80 on"]["hf+tame"]["finite"]
    assert faults["batches of NaN from 80 on"]["tame"]["exit"] == 3
    assert faults["SIGTERM in step 60"]["tame"]["exit"] == 143
    assert faults["SIGTERM in step 60"]["tame"]["resumed"]["exit"] == 0
    assert faults["SIGTERM in step 60"]["tame"]["saved"][-1] >= 60
    assert faults["the disk is full while step 50 is saved"]["tame"]["exit"] == 0
