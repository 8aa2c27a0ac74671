"""A fault on one process only: both do the same about it, and end with the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tameformer.record import RunReader
from tameformer.training import CheckpointFolder
from tameformer.training.checkpoint import load

HERE = Path(__file__).parent
WORDS = ["-m", "tameformer.cli", "train", "vit-digits", "--max_steps=24", "--data.batch_size=64", "--model.dim=16",
         "--loop.eval_steps=24", "--checkpoint.every=6", "--precision=fp32"]  # fmt: skip


def two(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launcher, *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=250,
    )  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    answer = two(HERE / "two_processes.py", folder)
    assert answer.returncode == 0, answer.stderr[-3000:]
    for rank in (0, 1):
        assert json.loads((folder / f"codes-{rank}.json").read_text()) == [0, 0, 0, 0, 0, 143, 143, 0]
    return folder


def events(folder, *kinds):
    return [event for event in RunReader(folder).events() if event["kind"] in kinds]


def lines(folder):
    return [
        {key: value for key, value in line.items() if not key.startswith("perf/")}
        for line in RunReader(folder).log() + RunReader(folder).probes()
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["faults", "faults-fsdp"])
def test_a_fault_on_one_process_is_skipped_by_both(ran, name):
    found = events(ran / name, "step_skipped", "rollback")
    assert [event["batch"] for event in found] == [3, 5, 7, 12, 16, 17, 18, 19]
    assert found[-1]["kind"] == "rollback"
    assert [line["step"] for line in lines(ran / name) if "train/lr" in line] == list(range(1, 25))


def test_memory_that_runs_out_on_one_process_is_saved_by_both(ran):
    """On either, on both, with accumulation: the batch is repeated by both, and the run is the same to rounding."""
    found = events(ran / "short", "out_of_memory")
    assert [(event["step"], event["parts"]) for event in found] == [(2, 2), (6, 4), (9, 8)]
    one, other = (load(CheckpointFolder(ran / name).path(12)) for name in ("short", "clean"))
    for name, tensor in other.model.items():
        torch.testing.assert_close(one.model[name], tensor, rtol=1e-3, atol=1e-5)
    for line, usual in zip(RunReader(ran / "short").log(), RunReader(ran / "clean").log(), strict=True):
        assert {key: line[key] for key in usual if key.startswith(("train/loss", "eval/loss"))} == pytest.approx(
            {key: value for key, value in usual.items() if key.startswith(("train/loss", "eval/loss"))}, rel=1e-4
        )


def test_interrupted_twice_equals_straight(ran):
    """A signal to either process alone stops both; workers, augmentation, average and the patch's state go on exactly."""
    one, other = (load(CheckpointFolder(ran / name).path(12)) for name in ("cut", "straight"))
    assert any(name.endswith(".right") for name in other.model)  # the singular vectors are in the checkpoint
    for part in ("model", "optimizer", "average"):
        tensors, expected = getattr(one, part), getattr(other, part)
        assert expected.keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in expected.items())
    assert one.state == other.state
    assert lines(ran / "cut") == lines(ran / "straight")


@pytest.mark.timeout(600)
def test_both_end_when_there_is_no_way_back(tmp_path):
    guard = ["--guard.max_skips=3", "--guard.max_rollbacks=0"]
    answer = two(*WORDS, f"--output_dir={tmp_path}", "--inject=nan@8-24:rank1", *guard)
    assert answer.returncode != 0
    assert answer.stderr.count("exitcode  : 3") >= 1, answer.stderr[-3000:]
    assert RunReader(tmp_path).events()[-1]["kind"] == "diverged"


@pytest.mark.timeout(600)
def test_nobody_waits_for_one_that_hangs(tmp_path):
    answer = two(*WORDS, f"--output_dir={tmp_path}", "--inject=hang@3:rank1", "--loop.hang_timeout=10")
    assert answer.returncode != 0
    assert answer.stderr.count("exitcode  : 124") >= 1, answer.stderr[-3000:]
    stacks = [(tmp_path / f"hang-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "faults.py" in stacks[1]  # the guilty one
    assert "faults.py" not in stacks[0]  # it waits for the other in a collective
    assert [event["step"] for event in events(tmp_path, "hang")] == [2]
