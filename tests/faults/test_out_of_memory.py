"""A run that runs out of memory goes on with smaller micro-batches, and remembers."""

import pytest
import torch

from tameformer.cli.__main__ import main
from tameformer.errors import OutOfMemoryError
from tameformer.recipes import launch, precision, vision
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder
from tameformer.training.checkpoint import load
from tameformer.training.memory import num_rows

pytestmark = pytest.mark.usefixtures("unreported")
SMALL = {
    "max_steps": 8,
    "data.batch_size": 24,
    "model.dim": 16,
    "model.num_layers": 1,
    "model.dropout": 0.0,
    "loop.logging_steps": 1,
    "loop.eval_steps": 8,
    "checkpoint.every": 4,
    "precision": "fp32",
    "optim.name": "sgd",  # Adam makes rounding as large as a step where a gradient is all but 0
    "optim.peak_lr": 0.05,
}


def run(folder, inject="", resume="never", **overrides):
    return launch.train(
        "vit-digits", overrides={**SMALL, **overrides, "output_dir": str(folder)}, inject=inject, resume=resume
    )


def events(folder, kind):
    return [event for event in RunReader(folder).events() if event["kind"] == kind]


def test_the_run_is_the_same_to_rounding(tmp_path):
    run(tmp_path / "clean")
    result = run(tmp_path / "short", "oom@1,oom@6")
    assert result.finished
    assert [(event["step"], event["parts"]) for event in events(tmp_path / "short", "out_of_memory")] == [
        (1, 2),
        (6, 4),
    ]
    lines, usual = (RunReader(tmp_path / name).log() for name in ("short", "clean"))
    assert [line["step"] for line in lines] == [line["step"] for line in usual]
    for line, reference in zip(lines, usual, strict=True):
        for key in reference:
            if key.startswith(("train/loss", "train/grad_norm", "train/lr", "eval/")):
                assert line[key] == pytest.approx(reference[key], rel=1e-4), (key, line["step"])
    weights, expected = (load(CheckpointFolder(tmp_path / name).path(8)).model for name in ("short", "clean"))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)
    assert {name for name, tensor in expected.items() if not torch.equal(weights[name], tensor)}  # it was in parts


def test_a_resume_remembers_and_equals_the_straight_run(tmp_path):
    """Interrupted after memory ran out: not one allocation is tried again, and the bits are the same."""
    run(tmp_path / "straight", "oom@3")
    assert run(tmp_path / "cut", "oom@3,term@6").exit_code == 143
    assert run(tmp_path / "cut", resume="auto").finished
    assert len(events(tmp_path / "cut", "out_of_memory")) == 1
    one, other = (load(CheckpointFolder(tmp_path / name).path(8)) for name in ("cut", "straight"))
    assert one.state["parts"] == 2
    for part in ("model", "optimizer"):
        assert all(torch.equal(tensor, getattr(other, part)[name]) for name, tensor in getattr(one, part).items())


def test_going_back_does_not_forget(tmp_path):
    guard = {"guard.max_skips": 0, "guard.healthy_steps": 0, "checkpoint.every": 2}
    assert run(tmp_path, "oom@3,nan@4", **guard).finished
    assert [event["to_step"] for event in events(tmp_path, "rollback")] == [2]
    assert load(CheckpointFolder(tmp_path).path(8)).state["parts"] == 2


def holding(most, real=vision.classification_loss):
    """The recipe's loss on a device that holds `most` samples."""

    def loss(model, batch, **options):
        value = real(model, batch, **options)
        if num_rows(batch) > most:
            torch.empty(2**62, dtype=torch.uint8)
        return value

    return loss


def test_it_is_bounded_and_the_end_is_clear(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "classification_loss", holding(0))
    with pytest.raises(OutOfMemoryError, match="memory runs out with one sample at a time"):
        run(tmp_path)
    assert [event["parts"] for event in events(tmp_path, "out_of_memory")] == [2, 4, 8, 16, 32]


def test_the_choice_of_a_precision_finds_a_batch_that_fits(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "candidates", lambda device: ["fp32", "bf16"])
    monkeypatch.setattr(vision, "classification_loss", holding(7))
    assert run(tmp_path, precision="auto", max_steps=1, **{"optim.warmup_steps": 0}).finished
    assert [event["parts"] for event in events(tmp_path, "out_of_memory")] == [2, 4]
    assert ": fastest on the first batch" in events(tmp_path, "precision")[0]["message"]


def test_in_an_evaluation_nothing_strikes(capsys, tmp_path):
    assert main(["train", f"--output_dir={tmp_path}/run", "--inject=oom@eval"]) == 2
    assert "oom strikes at the number of a batch, got eval" in capsys.readouterr().err
