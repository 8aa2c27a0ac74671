"""Formal languages as a recipe: learned, judged by length, told to the report, and diagnosed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data import SampleKeys
from tameformer.data.formal import Parity
from tameformer.data.strings import StringSource
from tameformer.errors import ConfigError
from tameformer.models import DecoderConfig, UniversalDecoderConfig, ponder_cost, universal_decoder
from tameformer.recipes.formal import StringsConfig, accuracy_by_length, evaluate, judged, real_positions, string_loss
from tameformer.recipes.launch import train
from tameformer.recipes.ponder import with_ponder_cost
from tameformer.record import RunReader
from tameformer.report import write_report
from tameformer.training import Engine

TINY = {
    "data.min_length": 2, "data.max_length": 10, "data.longest": 20, "data.num_eval_samples": 60, "data.batch_size": 16,
    "data.num_train_samples": 480, "model.dim": 16, "model.num_layers": 1, "max_steps": 60, "optim.warmup_steps": 5,
    "optim.peak_lr": 0.02, "loop.logging_steps": 10, "loop.eval_steps": 30,
}  # fmt: skip


class Oracle(nn.Module):
    """Knows parity up to a length, and is wrong about the end of longer prefixes."""

    def __init__(self, knows: int):
        super().__init__()
        self.knows = knows

    def forward(self, tokens):
        ones = ((tokens == 1).cumsum(1) % 2).float()
        end = 1 - 2 * ones
        end[:, self.knows + 1 :] *= -1
        return torch.stack([torch.ones_like(end), torch.ones_like(end), end], dim=-1) * 20


def test_a_string_is_right_when_all_of_its_positions_are():
    source = StringSource(Parity(), num_samples=200, min_length=1, max_length=12)
    rows = judged(Engine(), Oracle(knows=8), source, batch_size=33)
    assert len(rows) == 200
    assert (rows[:, 1] == (rows[:, 0] <= 8)).all()
    assert (rows[:, 3] == rows[:, 0] + 1).all()
    assert rows[rows[:, 0] <= 8, 2].max() < 1e-6
    assert rows[rows[:, 0] > 8, 2].min() > 10
    figure = accuracy_by_length([rows[rows[:, 0] <= 6], rows[rows[:, 0] > 6]], max_length=6)
    assert figure["x"] == [6, 16]
    assert figure["lines"]["lengths of training"] == [1.0, None]
    longer = rows[rows[:, 0] > 6]
    assert figure["lines"]["longer"] == [None, longer[:, 1].mean()]


def test_the_loss_counts_what_is_asked_and_nothing_else():
    tokens = torch.zeros(1, 3, dtype=torch.long)
    targets = torch.tensor([[[1, 0], [-1, -1], [0, -1]]])

    class Fixed(nn.Module):
        def forward(self, tokens):
            return torch.tensor([[[2.0, -1.0], [9.0, 9.0], [0.5, 9.0]]])

    expected = -sum(np.log(1 / (1 + np.exp(-logit))) for logit in (2.0, 1.0, -0.5))
    assert string_loss(Fixed(), {"tokens": tokens, "targets": targets}).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("architecture", "language", "method"),
    [
        ("transformer", "dyck", "sigma_reparam"),
        ("universal", "dyck", "sigma_reparam"),
        ("lstm", "parity", None),
        ("gru", "even_length", None),
    ],
)
def test_learns_is_drawn_diagnosed_and_exported(architecture, language, method, tmp_path, capsys):
    folder = tmp_path / "run"
    values = {**TINY, "model.architecture": architecture, "data.language": language, "output_dir": str(folder)}
    if architecture == "universal":
        del values["model.num_layers"]
    result = train("formal", overrides={**values, "stabilize": [method] if method else []})
    losses = [line["train/loss"] for line in RunReader(folder).log() if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    wanted = {"eval/loss", "eval/accuracy", "eval/loss_longer", "eval/accuracy_longer"}
    assert {key for key in result.metrics if key.startswith("eval/")} == wanted
    figure = RunReader(folder).figures()["accuracy-by-length"]
    assert figure["x"] == [10, 20]
    assert "Strings that are right throughout, by length" in write_report(folder).read_text()
    assert json.loads((folder / "preprocessing.json").read_text())["symbols"]
    assert main(["diagnose", str(folder)]) == 0
    assert capsys.readouterr().out
    tame.export(folder, tmp_path / "out")
    assert tame.load(tmp_path / "out")(torch.zeros(1, 4, dtype=torch.long)).isfinite().all()


def test_steps_cost_what_they_are_told_to(tmp_path):
    """The loss is that of the strings and, a target, the weight times the mean steps; a dear step is taken less often."""
    torch.manual_seed(0)
    config = UniversalDecoderConfig(dim=16, halting="adaptive", ponder_weight=0.5)
    model = universal_decoder(config, vocab_size=3)
    batch = StringSource(Parity(), num_samples=8, min_length=2, max_length=10).fetch(SampleKeys(0, 0, np.arange(8)))
    nn.init.normal_(model.stack.halting.weight)  # positions that halt at different steps
    loss = with_ponder_cost(string_loss, config, real=real_positions)
    cost = loss(model, batch) - string_loss(model, batch)
    halted = model.stack.halted
    spent = [(halted.steps + halted.rest)[row, : length + 1] for row, length in enumerate(batch["lengths"].tolist())]
    mean = torch.cat(spent).double().mean().item()
    assert abs(mean - ponder_cost(model).item()) > 1e-3  # padding would have counted
    assert cost.item() == pytest.approx(0.5 * batch["num_items"] * mean, rel=1e-4)
    filled = {
        **batch,
        "tokens": nn.functional.pad(batch["tokens"], (0, 5)),
        "targets": nn.functional.pad(batch["targets"], (0, 0, 0, 5), value=-1),
    }
    torch.testing.assert_close(loss(model, filled), loss(model, batch), rtol=1e-5, atol=0)
    fixed = replace(config, halting="fixed")
    assert with_ponder_cost(string_loss, fixed) is string_loss
    assert with_ponder_cost(string_loss, DecoderConfig()) is string_loss
    steps = []
    for weight in (0.0, 3.0):
        changes = {"model.architecture": "universal", "model.halting": "adaptive", "model.ponder_weight": weight}
        values = {
            **TINY,
            **changes,
            "data.language": "dyck",
            "max_steps": 40,
            "output_dir": str(tmp_path / str(weight)),
        }
        del values["model.num_layers"]
        train("formal", overrides=values)
        tame.export(tmp_path / str(weight), tmp_path / f"out-{weight}")
        trained = tame.load(tmp_path / f"out-{weight}")
        trained(batch["tokens"])
        steps.append(ponder_cost(trained).item())
    assert steps[1] < steps[0] - 0.05  # but for the cost both runs are the same


def test_steps_are_those_of_the_positions_that_count(tmp_path):
    torch.manual_seed(0)
    model = universal_decoder(UniversalDecoderConfig(dim=16, halting="adaptive"), vocab_size=3).eval()
    nn.init.normal_(model.stack.halting.weight, std=0.5)  # positions that halt at different steps
    sources = [StringSource(Parity(), num_samples=30, min_length=low, max_length=low + 4) for low in (1, 6)]
    settings = {"sources": sources, "batch_size": 7, "folder": tmp_path, "max_length": 5}
    with torch.no_grad():
        metrics = evaluate(Engine(), model, **settings)
        alone = []
        for source in sources:
            for index in range(30):
                batch = source.fetch(SampleKeys(0, 0, np.array([index])))
                model(batch["tokens"])
                alone.append(model.stack.halted.steps.mean().item())
    assert metrics["steps"] == pytest.approx(np.mean(alone[:30]), rel=1e-5)
    assert metrics["steps_longer"] == pytest.approx(np.mean(alone[30:]), rel=1e-5)
    assert len({round(steps, 3) for steps in alone}) > 3
    figure = json.loads((tmp_path / "figures" / "steps-by-length.json").read_text())
    assert figure["x"] == [5, 15]
    assert figure["lines"]["longer"] == [None, pytest.approx(metrics["steps_longer"])]
    assert "steps" not in evaluate(Engine(), Oracle(knows=8), **settings)


def test_membership_asks_once_a_string(tmp_path):
    values = {**TINY, "data.question": "membership", "data.language": "parity", "max_steps": 2, "optim.warmup_steps": 0}
    result = train("formal", overrides={**values, "output_dir": str(tmp_path / "run")})
    assert 0 < result.metrics["eval/accuracy"] < 1
    assert result.metrics["eval/loss"] == pytest.approx(np.log(2), abs=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 100}, "expected data.min_length <= data.max_length < data.longest, got 2, 100 and 100"),
        ({"language": "parity", "num_types": 2}, "data.num_types and data.max_depth belong to dyck, got .* parity"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StringsConfig(**settings)


def test_a_model_too_short_for_the_longest_string_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model\.max_length is 50, but strings have up to 100 symbols .*max_length 101"
    ):
        train("formal", overrides={"model.max_length": 50, "output_dir": str(tmp_path / "run")})
