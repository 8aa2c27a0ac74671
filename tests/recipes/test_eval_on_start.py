"""The loss that training starts from is measured when asked for, and changes nothing."""

import math
from dataclasses import fields
from pathlib import Path

from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder

TINY = {
    "max_steps": 6,
    "model.dim": 16,
    "loop.logging_steps": 2,
    "checkpoint.every": 3,
    "checkpoint.best_metric": "eval/loss",
    **{f"probes.{field.name}": None for field in fields(ProbesConfig)},  # which makes the report faster
}


def run(folder: Path, **changes) -> Path:
    train("vit-digits", overrides={**TINY, "output_dir": str(folder), **changes}, resume="auto")
    return folder


def evaluations(folder: Path) -> dict[int, float]:
    return {line["step"]: line["eval/loss"] for line in RunReader(folder).log() if "eval/loss" in line}


def test_the_first_line_is_the_loss_of_the_untrained_model_and_the_weights_are_the_same(tmp_path):
    plain = run(tmp_path / "plain")
    measured = run(tmp_path / "measured", **{"loop.eval_on_start": True})
    assert list(evaluations(plain)) == [6]
    losses = evaluations(measured)
    assert list(losses) == [0, 6]
    assert losses[6] == evaluations(plain)[6]
    assert abs(losses[0] - math.log(10)) < 1  # ten classes, random weights
    weights = [(CheckpointFolder(folder).path(6) / "model.safetensors").read_bytes() for folder in (plain, measured)]
    assert weights[0] == weights[1]
    assert (measured / "BEST").read_text().strip() == "step-000006"
    run(measured, **{"loop.eval_on_start": True, "max_steps": 8})
    assert list(evaluations(measured)) == [0, 6, 8]  # a resumed run has its start behind it


def test_the_start_does_not_depend_on_the_rate(tmp_path):
    low, high = (
        run(
            tmp_path / name,
            **{"loop.eval_on_start": True, "optim.peak_lr": rate, "max_steps": 1, "optim.warmup_steps": 0},
        )
        for name, rate in (("low", 1e-4), ("high", 1e-1))
    )
    assert evaluations(low)[0] == evaluations(high)[0]
    assert evaluations(low)[1] != evaluations(high)[1]
