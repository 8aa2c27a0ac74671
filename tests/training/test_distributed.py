"""Two processes with the same global batch do what one does."""

import os
import subprocess
import sys

import pytest

from tameformer.record import RunReader

COMMAND = [
    "train",
    "vit-digits",
    "--max_steps=16",
    "--data.batch_size=64",
    "--loop.logging_steps=2",
    "--loop.eval_steps=8",
]
KEYS = ("train/loss", "train/grad_norm", "train/clip_rate", "eval/loss", "eval/accuracy")


def tame(folder, *arguments, processes):
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    command = [*launcher, "tameformer.cli", *COMMAND, f"--output_dir={folder}", *arguments]
    answer = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return RunReader(folder).log()


@pytest.mark.timeout(400)
def test_two_processes_equal_one_and_resume(tmp_path):
    one = tame(tmp_path / "one", processes=1)
    two = tame(tmp_path / "two", processes=2)
    accumulated = tame(tmp_path / "parts", "--gradient_accumulation_steps=2", processes=2)
    for other in (two, accumulated):
        assert [line["step"] for line in other] == [line["step"] for line in one]
        for line, reference in zip(other, one, strict=True):
            for key in KEYS:
                if key in reference:
                    assert line[key] == pytest.approx(reference[key], rel=1e-3, abs=1e-6), (key, line["step"])


def test_a_process_leaves_with_all_said_and_its_interpreter_up(tmp_path):
    script = f"""
import atexit
import torch.distributed as dist
from tameformer.training.engine import leave

class Last:
    def __del__(self):
        print("taken down")

kept = Last()
dist.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=0, world_size=1)
atexit.register(print, "at exit")
print("said before")
leave(7)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (7, "said before\nat exit\n"), answer.stderr
