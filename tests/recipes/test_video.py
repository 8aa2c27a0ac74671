"""Films as a recipe: tubelets and convolutions, shown in the report, diagnosed and exported."""

import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.recipes.launch import train
from tameformer.recipes.video import FilmsConfig
from tameformer.record import RunReader
from tameformer.report import write_report

TINY = {
    "data.num_frames": 4, "data.side": 8, "data.noise": 0.0, "data.num_train_samples": 200, "data.num_eval_samples": 40,
    "data.batch_size": 32, "data.target": "digit", "max_steps": 40, "loop.logging_steps": 8, "loop.eval_steps": 20,
    "optim.peak_lr": 0.01, "overfit_batches": 1,
}  # fmt: skip
MODELS = {
    "transformer": {"model.dim": 16, "model.num_heads": 2, "model.num_layers": 1, "model.hidden_dim": 32},
    "resnet3d": {"model.widths": [8, 16]},
}


@pytest.mark.parametrize("architecture", list(MODELS))
def test_learns_is_shown_diagnosed_and_exported(architecture, tmp_path, capsys):
    folder = tmp_path / "run"
    values = {**TINY, **MODELS[architecture], "model.architecture": architecture, "stabilize": ["sigma_reparam"]}
    result = train("video", overrides={**values, "output_dir": str(folder)})
    losses = [line["train/loss"] for line in RunReader(folder).log() if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert {key for key in result.metrics if key.startswith("eval/")} == {"eval/loss", "eval/accuracy"}
    assert len(RunReader(folder).figures()["films"]["rows"]) == 4
    assert "Films that are evaluated" in write_report(folder).read_text()
    assert main(["diagnose", str(folder)]) == 0
    assert capsys.readouterr().out
    tame.export(folder, tmp_path / "out")
    assert tame.load(tmp_path / "out")(torch.zeros(1, 1, 4, 8, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slowest": 2.0}, r"expected 0 < data\.slowest <= data\.fastest, got 2\.0 and 1\.4"),
        ({"num_frames": 0}, r"data\.num_frames must be at least 1, got 0"),
        ({"validation_fraction": 1.0}, r"data\.validation_fraction must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FilmsConfig(**settings)
