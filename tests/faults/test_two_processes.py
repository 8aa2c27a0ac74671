"""A fault on one process only: both skip the same steps, and end with the same weights."""

import os
import subprocess
import sys

import pytest

from tameformer.record import RunReader

WORDS = ["train", "vit-digits", "--max_steps=24", "--data.batch_size=64", "--model.dim=16", "--loop.logging_steps=1",
         "--loop.eval_steps=24", "--checkpoint.every=6", "--guard.min_values=8", "--guard.healthy_steps=2",
         "--guard.max_skips=3"]  # fmt: skip


def two(folder, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    return subprocess.run(
        [*launcher, "tameformer.cli", *WORDS, f"--output_dir={folder}", *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=250,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_a_fault_on_one_process_is_skipped_by_both(tmp_path):
    faults = "nan@3:rank1,inf-grad@5:rank0,bad-batch@7:rank1,spike@12x1000:rank1,nan@16-19:rank1"
    answer = two(tmp_path, f"--inject={faults}")
    assert answer.returncode == 0, answer.stderr[-3000:]
    events = [event for event in RunReader(tmp_path).events() if event["kind"] in ("step_skipped", "rollback")]
    batches = [event["batch"] for event in events]
    assert batches == [3, 5, 7, 12, 16, 17, 18, 19]
    assert events[-1]["kind"] == "rollback"
    assert RunReader(tmp_path).events()[-1]["kind"] in ("finish", "checkpoint")
    lines = [line for line in RunReader(tmp_path).log() if "train/lr" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))


@pytest.mark.timeout(600)
def test_both_end_when_there_is_no_way_back(tmp_path):
    answer = two(tmp_path, "--inject=nan@8-24:rank1", "--guard.max_rollbacks=0")
    assert answer.returncode != 0
    assert answer.stderr.count("exitcode  : 3") >= 1, answer.stderr[-3000:]
    assert RunReader(tmp_path).events()[-1]["kind"] == "diverged"
