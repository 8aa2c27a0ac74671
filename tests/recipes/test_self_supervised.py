"""Pre-training without labels: learned, probed, seen in the report, handed over, resumed to the bit."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data.sources import digits
from tameformer.errors import ConfigError
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.linear_probe import probe_accuracy
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder, Engine, Listener

MODEL = {"model.dim": 16, "model.num_layers": 1, "model.num_heads": 2, "model.patch_size": 2}
SMALL = MODEL | {
    "data.source": "digits", "data.batch_size": 64, "data.augment": [], "data.shift_pixels": None, "max_steps": 30,
    "precision": "fp32", "optim.warmup_steps": 3, "optim.peak_lr": 0.01, "loop.logging_steps": 5, "loop.eval_steps": 15,
    "linear_probe_samples": 200, **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
}  # fmt: skip
TASKS = {
    "masked-image": {"model.decoder_dim": 16},
    "contrastive": {"data.augment": ["resized_crop", "color_jitter"], "model.projection_dim": 16},
}


class Stop(Listener):
    """Ctrl-C after the twentieth step."""

    def on_log(self, step, values):
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module", params=list(TASKS))
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    values = {**SMALL, **TASKS[request.param], "output_dir": str(folder), "loop.eval_on_start": True}
    result = tame.train(request.param, overrides=values)
    return request.param, folder, result


def test_it_learns_and_is_probed(run):
    task, folder, result = run
    losses = {line["step"]: line["eval/loss"] for line in RunReader(folder).log() if "eval/loss" in line}
    assert losses[30] < {"masked-image": 0.8, "contrastive": 0.97}[task] * losses[0]
    assert result.metrics["eval/linear_probe_accuracy"] > 0.5


def test_a_stopped_run_ends_with_the_same_bits(run, tmp_path):
    task, folder, _ = run
    values = {**SMALL, **TASKS[task], "output_dir": str(tmp_path), "loop.eval_on_start": True}
    assert tame.train(task, overrides=values, listeners=[Stop()]).exit_code == 143
    tame.train(task, overrides=values, resume="auto")
    manifests = [
        json.loads((CheckpointFolder(one).path(30) / "manifest.json").read_text()) for one in (folder, tmp_path)
    ]
    assert manifests[0]["files"] == manifests[1]["files"]


def test_the_classifier_goes_on_from_it_with_one_key(run, tmp_path):
    _, folder, _ = run
    first = {**MODEL, "data.source": "digits", "max_steps": 1, "data.augment": [], "data.shift_pixels": None,
             "optim.peak_lr": 1e-30, "optim.warmup_steps": 0, "optim.ema_decay": None, "precision": "fp32"}  # fmt: skip
    tame.train("vit", overrides={**first, "init_from": str(folder), "output_dir": str(tmp_path / "on")})
    tame.export(folder, tmp_path / "before")
    tame.export(tmp_path / "on", tmp_path / "after")
    before, after = tame.load(tmp_path / "before"), tame.load(tmp_path / "after")
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(before.features(images), after.features(images))
    assert after(images).shape == (2, 10)


def test_it_can_be_diagnosed_and_stabilized(run, tmp_path, capsys):
    task, folder, _ = run
    assert main(["diagnose", str(folder)]) == 0
    assert "Attention heads" in capsys.readouterr().out
    values = {**SMALL, **TASKS[task], "stabilize": ["sigma_reparam"], "max_steps": 4, "output_dir": str(tmp_path)}
    assert np.isfinite(tame.train(task, overrides=values).metrics["eval/loss"])


def test_reconstructions_are_in_the_report(run):
    task, folder, _ = run
    if task != "masked-image":
        pytest.skip("pictures are of masked images")
    figure = json.loads((folder / "figures" / "reconstructions.json").read_text())
    pictures = {kind: np.array(some) for kind, some in figure["rows"].items()}
    assert all(some.shape == (8, 8, 8) for some in pictures.values())
    seen = pictures["seen"] == pictures["original"]
    assert (pictures["seen"][~seen] == 0).all()
    assert (pictures["reconstructed"] == pictures["original"])[pictures["seen"] > 0].all()
    assert "Hidden patches" in (folder / "report.html").read_text()


def test_the_probe_is_logistic_regression_on_standardized_features():
    """Features that are the pixels: the same as scikit-learn on the pixels themselves."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, held_out = digits("train").take(np.arange(300)), digits("test").take(np.arange(100))
    model = torch.nn.Identity()
    got = probe_accuracy(
        Engine(),
        model,
        train=train,
        held_out=held_out,
        batch_size=64,
        features=lambda model, images: model(images).flatten(1),
    )
    pixels = [source.images.reshape(len(source), -1).astype(np.float64) for source in (train, held_out)]
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(pixels[0], train.labels)
    assert got == pytest.approx(reference.score(pixels[1], held_out.labels))
    one = train.take(np.flatnonzero(train.labels == 3))
    with pytest.raises(ConfigError, match="images of two classes at least; turn it off: --linear_probe_samples null"):
        probe_accuracy(
            Engine(),
            model,
            train=one,
            held_out=held_out,
            batch_size=64,
            features=lambda model, images: images.flatten(1),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio 1\.0 leaves 0 of 16 patches to see"),
        (
            {"data.mixup_alpha": 0.2},
            r"data\.mixup_alpha mixes labels, of which nothing is learned here, got 0\.2; give 0",
        ),
        ({"linear_probe_samples": 1}, "linear_probe_samples must be at least 2, got 1; null for no probe"),
        ({"model.patch_size": 3}, "expected patch_size that divides the image size"),
    ],
)
def test_what_cannot_be_masked_is_refused(changes, message, tmp_path):
    with pytest.raises((ConfigError, ValueError), match=message):
        tame.train("masked-image", overrides={**SMALL, **changes, "output_dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.augment": []}, r"two views need augmentations, and data\.augment is empty"),
        ({"gradient_accumulation_steps": 2}, "expected gradient_accumulation_steps 1, got 2; take a smaller"),
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"data.batch_size": 1}, r"data\.batch_size is 1; expected at least 2 images"),
        ({"model.pooling": "softmax"}, "choose mean or class_token"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, message, tmp_path):
    values = {**SMALL, "data.augment": ["resized_crop"], **changes, "output_dir": str(tmp_path)}
    with pytest.raises((ConfigError, ValueError), match=message):
        tame.train("contrastive", overrides=values)
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(400)
def test_two_processes_compare_with_the_images_of_both(tmp_path):
    arguments = [
        "train", "contrastive", "--data.source=digits", "--data.augment=[resized_crop]", "--data.batch_size=32",
        "--max_steps=4", "--optim.warmup_steps=1", "--precision=fp32", "--loop.logging_steps=1", "--linear_probe_samples=200",
        *(f"--{name}={value}" for name, value in MODEL.items()),
    ]  # fmt: skip
    lines = []
    for processes in (1, 2):
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"] if processes > 1 else []
        command = [
            sys.executable,
            "-m",
            *launcher,
            "tameformer.cli",
            *arguments,
            f"--output_dir={tmp_path / str(processes)}",
        ]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr[-3000:]
        lines.append(RunReader(tmp_path / str(processes)).log())
    for one, two in zip(*lines, strict=True):
        for key in ("train/loss", "train/grad_norm", "eval/loss", "eval/linear_probe_accuracy"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])
