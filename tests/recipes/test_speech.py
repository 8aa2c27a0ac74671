"""Speech recognition as a recipe: both heads and a recurrent one on tones that stand for digits, and a manifest."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.errors import ConfigError
from tameformer.recipes.launch import train
from tameformer.recipes.speech import real_tokens, speech_loss
from tameformer.recipes.word_errors import write_errors_by_length
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder, Listener

RATE = 1000
TINY = {
    "data.num_digits": 2, "data.num_train_samples": 60, "data.num_eval_samples": 10, "data.num_mels": 8,
    "data.window_seconds": 0.064, "data.max_frames": 600, "model.dim": 16, "model.num_layers": 1, "model.dropout": 0.0,
    "optim.warmup_steps": 2, "optim.peak_lr": 0.01, "loop.logging_steps": 4, "max_steps": 24, "loop.eval_steps": 12,
    "num_train_epochs": None, "decoding.num_beams": 2, "decoding.max_new_tokens": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Each digit is a tone; 200 ms, so that its letters have room."""
    label, index = (part.ravel() for part in np.mgrid[0:10, 0:3])
    waves = [8000 * np.sin(2 * np.pi * 40 * (digit + 1) * np.arange(200) / RATE) for digit in label]
    file = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(
        file,
        audio=np.concatenate(waves).astype(np.int16),
        offsets=np.arange(31) * 200,
        label=label,
        speaker=np.zeros(30, dtype=np.int64),
        is_test=index == 2,
        sample_rate=RATE,
    )
    return str(file)


@pytest.mark.parametrize(
    ("choice", "method"),
    [
        ({"model.head": "ctc"}, "sigma_reparam"),
        ({"model.head": "decoder", "label_smoothing": 0.1, "model.residual": "post"}, "admin"),
        ({"model.architecture": "gru"}, None),
    ],
    ids=["ctc", "decoder", "gru"],
)
def test_learns_is_transcribed_diagnosed_and_exported(choice, method, digits, tmp_path, capsys):
    folder = tmp_path / "run"
    values = {**TINY, **choice, "data.path": digits, "stabilize": [method] if method else []}
    result = train("speech", overrides={**values, "output_dir": str(folder)})
    losses = [line["train/loss"] for line in RunReader(folder).log() if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    wanted = {"eval/loss", "eval/wer", "eval/cer", "test/wer", "test/cer"}
    assert {key for key in result.metrics if key.startswith(("eval/", "test/"))} == wanted
    assert "Errors by length" in (folder / "report.html").read_text()
    assert main(["diagnose", str(folder)]) == 0
    assert capsys.readouterr().out
    tame.export(folder, tmp_path / "out")
    model = tame.load(tmp_path / "out")
    features, frames = torch.zeros(1, 9, 8), torch.tensor([9])
    out = model(features, frames, torch.tensor([[1]])) if "decoder" in choice.values() else model(features, frames)[0]
    assert out.isfinite().all()
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["log_mel"]["num_mels"] == 8


class Interrupt(Listener):
    def on_log(self, step, values):
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)


def test_resumes_exactly_with_lengths_that_change_with_the_epoch(digits, tmp_path):
    values = {**TINY, "data.path": digits, "loop.eval_steps": 100, "max_steps": 16}
    train("speech", overrides={**values, "output_dir": str(tmp_path / "straight")})
    again = {**values, "output_dir": str(tmp_path / "stopped")}
    assert train("speech", overrides=again, listeners=[Interrupt()]).exit_code == 143
    assert train("speech", overrides=again, resume="auto").finished
    files = [
        json.loads((CheckpointFolder(tmp_path / name).path(16) / "manifest.json").read_text())["files"]
        for name in ("straight", "stopped")
    ]
    assert files[0] == files[1]


def test_a_manifest_is_learned(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    for split, count in (("train", 12), ("valid", 4)):
        lines = []
        for number in range(count):
            soundfile.write(tmp_path / f"{split}{number}.wav", 0.3 * np.sin(np.arange(300) * (0.2 + number % 2)), RATE)
            lines.append(json.dumps({"path": f"{split}{number}.wav", "text": ("low", "high")[number % 2]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    given = {"data.source": "manifest", "data.path": str(tmp_path / "train.jsonl")}
    values = {**TINY, **given, "max_steps": 4, "loop.eval_steps": 4}
    with pytest.raises(ConfigError, match="needs a manifest to evaluate on"):
        train("speech", overrides={**values, "output_dir": str(tmp_path / "run")})
    values["data.validation_path"] = str(tmp_path / "valid.jsonl")
    assert train("speech", overrides={**values, "output_dir": str(tmp_path / "run")}).finished


def test_the_loss_is_the_sum_over_all_paths():
    class Fixed(torch.nn.Module):
        blank = 2

        def forward(self, features, frames):
            return torch.tensor([[[0.1, 0.3, 0.6], [0.5, 0.1, 0.4], [0.2, 0.2, 0.6]]]).log(), torch.tensor([2])

    batch = {"features": torch.zeros(1, 3, 1), "frames": torch.tensor([2]), "targets": torch.tensor([[0, 3]])}
    # "a" over two outputs: a a, a blank, blank a; the third output is padding.
    expected = -math.log(0.1 * 0.5 + 0.1 * 0.4 + 0.6 * 0.5)
    assert speech_loss(Fixed(), batch).item() == pytest.approx(expected, rel=1e-6)


def test_masks_follow_the_subsampling():
    batch = {
        "frames": torch.tensor([9, 4]),
        "features": torch.zeros(2, 9, 1),
        "targets": torch.tensor([[1, 2], [1, -100]]),
    }
    real = real_tokens(batch, subsampling=2)
    assert real["encoder"].sum(1).tolist() == [5, 2]
    assert real["decoder"].tolist() == [[True, True], [True, False]]


def test_errors_are_shown_by_the_length_of_what_was_said(tmp_path):
    said = ["one"] * 20 + ["one two"] * 25 + ["one two three"] * 4
    heard = ["one"] * 10 + ["two"] * 10 + ["one two"] * 25 + ["one"] * 4
    order = list(range(0, 49, 2)) + list(range(1, 49, 2))
    write_errors_by_length(tmp_path, [said[i] for i in order], [heard[i] for i in order])
    figure = json.loads((tmp_path / "figures" / "errors-by-length.json").read_text())
    assert figure["x"] == pytest.approx([1, 62 / 29])
    assert figure["lines"]["words"] == pytest.approx([0.5, 8 / 62])


def test_label_smoothing_without_a_decoder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.1, but the head ctc has none"):
        train("speech", overrides={"label_smoothing": 0.1, "output_dir": str(tmp_path)})
