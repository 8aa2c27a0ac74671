"""SIGKILL again and again, two thirds of them aimed at saves: what `benchmarks/kill_loop.py` records at length, in short."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_loop.py"


def killed(folder, kills: int) -> dict:
    answer = subprocess.run(
        [sys.executable, SCRIPT, f"--kills={kills}", f"--output={folder}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads((folder / "kill_loop.json").read_text())["raw"]


def check(found: dict, kills: int) -> None:
    assert len(found["kills"]) == kills
    assert found["failures"] == 0  # every resume went on
    assert found["differ"] == 0  # every run that finished is the straight one, to the bit
    assert all(kill["damaged"] == 0 for kill in found["kills"])  # whatever has its final name is whole
    assert all(kill["lost"] <= 3 for kill in found["kills"])  # at most one interval
    assert any("written" in kill["left"] for kill in found["kills"])  # some did strike in a save


@pytest.mark.timeout(600)
def test_twenty_kills(tmp_path):
    check(killed(tmp_path, 20), 20)


@pytest.mark.slow
@pytest.mark.timeout(6000)
def test_two_hundred_kills(tmp_path):
    check(killed(tmp_path, 200), 200)
