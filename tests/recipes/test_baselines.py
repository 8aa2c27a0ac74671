"""Recipes with another architecture in the Transformer's place: same run, same tools."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data import SampleKeys
from tameformer.data.packing import PackedDocuments
from tameformer.models import UniversalDecoderConfig, ponder_cost, universal_decoder
from tameformer.recipes import lm
from tameformer.recipes.launch import train
from tameformer.recipes.ponder import with_ponder_cost
from tameformer.record import RunReader

SMALL = {"loop.logging_steps": 10, "precision": "fp32"}
LM = {**SMALL, "max_steps": 40, "model.dim": 16, "model.num_layers": 1, "optim.warmup_steps": 5, "optim.peak_lr": 0.02}
IMAGES = {**SMALL, "max_steps": 40, "optim.peak_lr": 0.01, "model.widths": [8, 16]}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 120)
    return str(file)


@pytest.mark.parametrize(
    ("recipe", "architecture", "method"),
    [
        ("char-lm", "lstm", "z_loss"),
        ("char-lm", "gru", "z_loss"),
        ("char-lm", "universal", "sigma_reparam"),
        ("lm", "lstm", "z_loss"),
        ("lm", "gru", "z_loss"),
        ("vit-digits", "resnet", "sigma_reparam"),
        ("vit-digits", "cnn", "sigma_reparam"),
    ],
)
def test_learns_is_diagnosed_and_exported(recipe, architecture, method, text, tmp_path, capsys):
    values = IMAGES if recipe == "vit-digits" else {**LM, "data.path": text}
    if recipe == "lm":
        values |= {"data.validation_path": text, "data.vocab_size": 300, "data.batch_size": 4}
    if architecture == "universal":
        del values["model.num_layers"]
        values |= {"model.num_steps": 2, "optim.peak_lr": 0.05}
    folder = tmp_path / "run"
    values = {**values, "model.architecture": architecture, "stabilize": [method], "output_dir": str(folder)}
    result = train(recipe, overrides=values)
    losses = [line["train/loss"] for line in RunReader(folder).log() if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert json.loads((folder / "model.json").read_text())["config"]["architecture"] == architecture
    assert any(key.startswith("diag/spectral_norm/") for line in RunReader(folder).probes() for key in line)

    assert main(["diagnose", str(folder)]) == 0
    assert "spectral" in capsys.readouterr().out
    exported = tame.export(folder, tmp_path / "out")
    assert exported.step == result.step
    model = tame.load(tmp_path / "out")
    shape = (1, 1, 8, 8) if recipe == "vit-digits" else (1, 5)
    out = model(torch.zeros(shape) if recipe == "vit-digits" else torch.zeros(shape, dtype=torch.long))
    assert out.isfinite().all()


def test_a_run_folder_keeps_its_architecture(tmp_path):
    values = {**IMAGES, "model.architecture": "cnn", "max_steps": 3, "output_dir": str(tmp_path / "run")}
    train("vit-digits", overrides=values)
    again = train(str(tmp_path / "run"), overrides={"output_dir": str(tmp_path / "again")})
    log = [[line.get("train/loss") for line in RunReader(tmp_path / name).log()] for name in ("run", "again")]
    assert log[0] == log[1]
    assert again.finished


def test_what_fills_a_window_of_documents_up_costs_no_steps():
    torch.manual_seed(0)
    config = UniversalDecoderConfig(dim=16, halting="adaptive", ponder_weight=0.5, max_length=8)
    model = universal_decoder(config, vocab_size=12)
    nn.init.normal_(model.stack.halting.weight)  # positions that halt at different steps
    packed = PackedDocuments([np.array([7, 8, 9]), np.array([5])], 8, begin_id=1, end_id=2)
    batch = packed.fetch(SampleKeys(0, 0, np.arange(1)))
    cost = with_ponder_cost(lm.packed_loss, config, lm.real_positions)(model, batch) - lm.packed_loss(model, batch)
    halted = model.stack.halted
    spent = (halted.steps + halted.rest)[0, :6]  # of 8 positions
    assert cost.item() == pytest.approx(0.5 * 6 * spent.mean().item(), rel=1e-4)
    assert abs(ponder_cost(model).item() - spent.mean().item()) > 1e-3
