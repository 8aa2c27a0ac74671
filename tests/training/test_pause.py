"""A run that pauses where it was asked to, and goes on as if it never had."""

import json

import pytest

from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.studies.cells import state_of, write_exit
from tameformer.training import CheckpointFolder, LoopConfig

pytestmark = pytest.mark.usefixtures("unreported")
SMALL = {
    "max_steps": 20,
    "data.batch_size": 96,  # 14 steps an epoch
    "model.dim": 16,
    "model.dropout": 0.1,
    "loop.logging_steps": 4,
    "loop.eval_steps": 10,
    "checkpoint.best_metric": "eval/accuracy",
    "checkpoint.best_mode": "max",
    "optim.ema_decay": 0.9,
}


def hashes(folder) -> dict:
    return json.loads((CheckpointFolder(folder).path(20) / "manifest.json").read_text())["files"]


@pytest.mark.parametrize(("share", "step"), [(0.31, 7), (0.5, 10)], ids=["between evaluations", "at one"])
def test_a_run_that_paused_equals_one_that_never_did(tmp_path, share, step):
    straight, paused = tmp_path / "straight", tmp_path / "paused"
    train("vit-digits", overrides={**SMALL, "output_dir": str(straight)})
    given = {**SMALL, "output_dir": str(paused)}
    result = train("vit-digits", overrides={**given, "loop.pause_after": share})
    assert (result.finished, result.exit_code, result.step) == (False, 0, step)
    told = RunReader(paused).events()[-1]
    assert (told["kind"], told["step"]) == ("pause", step)
    assert told["eval/accuracy"] == result.metrics["eval/accuracy"]
    write_exit(paused, 0, "")
    assert state_of(paused) == ("paused", "")

    before = (paused / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_bytes()
    again = train("vit-digits", overrides={**given, "loop.pause_after": share}, resume="auto")  # asked for once more
    assert (again.finished, again.step) == (False, step)
    assert (paused / "checkpoints" / f"step-{step:06d}" / "manifest.json").read_bytes() == before

    assert train("vit-digits", overrides=given, resume="auto").finished
    assert hashes(straight) == hashes(paused)
    assert (straight / "BEST").read_text() == (paused / "BEST").read_text()
    drift = [event for event in RunReader(paused).events() if event["kind"] == "config_drift"]
    assert drift == []
    assert state_of(paused) == ("finished", "")


def test_a_share_of_the_run_that_is_its_end_is_no_pause():
    assert LoopConfig(pause_after=1.0).pause_step(10) is None
    assert [LoopConfig(pause_after=0.3).pause_step(steps) for steps in (10, 100, 1000, 3)] == [3, 30, 300, 1]
    with pytest.raises(ValueError, match=r"loop.pause_after must lie in \(0, 1\], got 1.5"):
        LoopConfig(pause_after=1.5)
