"""A run stopped anywhere and resumed ends with the same bits as one that never stopped."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.report.read import read_run
from tameformer.report.verdict import run_state
from tameformer.studies.cells import state_of
from tameformer.training import CheckpointFolder, Listener

pytestmark = pytest.mark.usefixtures("unreported")
MAX_STEPS = 26
SMALL = {
    "max_steps": MAX_STEPS,
    "data.batch_size": 96,  # 14 steps an epoch
    "model.dim": 32,
    "model.dropout": 0.1,
    "model.drop_path": 0.1,
    "loop.logging_steps": 4,
    "loop.eval_steps": 13,
    "optim.ema_decay": 0.9,
}


class Interrupt(Listener):
    """Sends this process a real SIGTERM when a step has been logged or evaluated."""

    def __init__(self, step: int):
        self.step = step

    def on_log(self, step, values):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    on_evaluate = on_log


def final_state(folder: Path) -> dict:
    """Hashes of weights, optimizer and average, the loop's state, and all log lines without times."""
    manifest = json.loads((CheckpointFolder(folder).path(MAX_STEPS) / "manifest.json").read_text())
    lines = [
        {key: value for key, value in line.items() if not key.startswith("perf/")}
        for line in RunReader(folder).log() + RunReader(folder).probes()
    ]
    return {"files": manifest["files"], "lines": lines}


def run(folder: Path, overrides: dict, **options):
    return train("vit-digits", overrides={**SMALL, **overrides, "output_dir": str(folder)}, **options)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"data.num_workers": 2},
        {"gradient_accumulation_steps": 4},
        {"data.augment": ["shift", "affine"], "data.mixup_alpha": 0.2, "data.num_workers": 2},
        {
            "gradient_accumulation_steps": 4,
            "data.augment": ["trivial_augment"],
            "data.num_workers": 2,
            "optim.name": "sgd",
        },
    ],
    ids=["plain", "workers", "accumulation", "augmented-workers", "all-sgd"],
)
# 8: in the middle of an epoch, at a line of the log; 13: at an evaluation; 14: the boundary of an epoch, between lines.
@pytest.mark.parametrize("stop_after", [(8,), (14,), (4, 13, 20)], ids=str)
def test_resumed_equals_never_stopped(tmp_path_factory, tmp_path, overrides, stop_after):
    straight = _straight(tmp_path_factory, overrides)
    for step in stop_after:
        watcher = Interrupt(step) if step != 14 else _InterruptAfterStep14()
        result = run(tmp_path, overrides, resume="auto", listeners=[watcher])
        assert (result.finished, result.exit_code) == (False, 143)
        assert result.step == (14 if step == 14 else step + 1)  # the step that runs when the signal comes is finished
    result = run(tmp_path, overrides, resume="auto")
    assert result.finished
    assert result.exit_code == 0
    assert final_state(tmp_path) == straight


class _InterruptAfterStep14(Listener):
    """Step 13 is evaluated; the signal arrives while step 14 runs, so that the run stops at the epoch's boundary."""

    def on_save(self, step):
        if step == 13:
            os.kill(os.getpid(), signal.SIGTERM)


def interrupted(folder: Path, overrides: dict, steps) -> dict:
    """The final state of a run that SIGTERM stopped in each of these steps."""
    inject = ",".join(f"term@{step}" for step in steps)  # each strikes once in the life of the folder
    for _ in steps:
        result = run(folder, overrides, resume="auto", inject=inject)
        assert (result.finished, result.exit_code) == (False, 143)
    assert run(folder, overrides, resume="auto", inject=inject).finished
    return final_state(folder)


def test_five_interruptions_of_a_patched_model(tmp_path_factory, tmp_path):
    """The state of sigmaReparam, singular vectors and all, is part of what goes on."""
    patched = {"stabilize": ["sigma_reparam"], "gradient_accumulation_steps": 2}
    straight = _straight(tmp_path_factory, patched)
    assert interrupted(tmp_path, {**patched, "data.num_workers": 2}, (1, 5, 14, 15, 25)) == straight


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(24))
def test_any_combination_interrupted_anywhere(tmp_path_factory, tmp_path, seed):
    """Workers, augmentation, accumulation, average, patch and optimizer drawn at random, stopped 1 to 5 times."""
    draw = random.Random(seed)
    overrides = {
        "data.num_workers": draw.choice([0, 2]),
        "data.augment": draw.choice([[], ["shift", "affine"], ["trivial_augment"]]),
        "data.mixup_alpha": draw.choice([0.0, 0.2]),
        "gradient_accumulation_steps": draw.choice([1, 4]),
        "optim.ema_decay": draw.choice([None, 0.9]),
        "optim.name": draw.choice(["adamw", "sgd", "muon"]),
        "stabilize": draw.choice([[], ["sigma_reparam"], ["qk_norm"], ["layer_scale"]]),
    }
    steps = sorted(draw.sample(range(1, MAX_STEPS), draw.randint(1, 5)))
    assert interrupted(tmp_path, overrides, steps) == _straight(tmp_path_factory, overrides)


_STRAIGHT: dict[str, dict] = {}


def _straight(tmp_path_factory, overrides) -> dict:
    # The number of workers must not matter, so that runs with workers are held against one without.
    key = json.dumps({name: value for name, value in overrides.items() if name != "data.num_workers"}, sort_keys=True)
    if key not in _STRAIGHT:
        folder = tmp_path_factory.mktemp("straight")
        run(folder, json.loads(key))
        _STRAIGHT[key] = final_state(folder)
    return _STRAIGHT[key]


def test_a_run_that_was_killed_before_it_could_say_that_it_finished_says_so(tmp_path):
    run(tmp_path, {"max_steps": 2})
    events = tmp_path / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines(keepends=True)
    assert '"finish"' in lines[-1]
    events.write_text("".join(lines[:-1]), encoding="utf-8")  # SIGKILL between the last checkpoint and the event
    for _ in range(2):  # and a run that has said so, is resumed for nothing, and stays finished
        assert run(tmp_path, {"max_steps": 2}, resume="auto").finished
        assert RunReader(tmp_path).events()[-1]["kind"] == "finish"
        assert run_state(read_run(tmp_path))[0] == "finished"
        assert state_of(tmp_path) == ("finished", "")


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    run(tmp_path / "a", {"seed": 1})
    run(tmp_path / "b", {"seed": 1})
    run(tmp_path / "c", {"seed": 2})
    run(tmp_path / "d", {"seed": 1, "data_seed": 2})
    a, b, c, d = (final_state(tmp_path / name)["files"]["model.safetensors"] for name in "abcd")
    assert a == b
    assert a != c
    assert a != d


def test_watching_changes_nothing(tmp_path):
    """With probes at each step, or at the last one only: the same weights."""
    run(tmp_path / "often", {"loop.logging_steps": 1})
    run(tmp_path / "rarely", {"loop.logging_steps": MAX_STEPS})
    often, rarely = (final_state(tmp_path / name)["files"] for name in ("often", "rarely"))
    assert often["model.safetensors"] == rarely["model.safetensors"]
    assert often["optimizer.safetensors"] == rarely["optimizer.safetensors"]
