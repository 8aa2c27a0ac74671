"""The recurrent translator takes the Transformer's place in the recipe: trained, searched, shown by length, exported."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.translation import write_bleu_by_length

WORDS = ("ein", "mann", "geht", "hund", "rot", "blau", "und", "haus")


@pytest.mark.parametrize("attention", ["additive", "none"])
def test_it_learns_translates_and_is_exported(attention, tmp_path, capsys):
    for split, count in (("train", 120), ("val", 10)):
        lines = [" ".join(WORDS[(3 * index + i) % 8] for i in range(1 + index % 6)) for index in range(count)]
        (tmp_path / f"{split}.en").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{split}.de").write_text("\n".join(line.upper() for line in lines) + "\n")
    values = {
        "data.path": str(tmp_path / "train"), "data.validation_path": str(tmp_path / "val"), "data.vocab_size": 300,
        "data.max_tokens": 600, "model.attention": attention, "model.dim": 16, "max_steps": 30, "precision": "fp32",
        "optim.peak_lr": 0.02, "optim.warmup_steps": 3, "decoding.num_beams": 2, "loop.logging_steps": 5,
        **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
    }  # fmt: skip
    result = tame.train("seq2seq-rnn", overrides={**values, "output_dir": str(tmp_path / "run")})
    assert result.metrics["eval/loss"] < 4
    assert {"test/bleu", "test/bleu_lowercased", "test/bleu_tokenized"} <= result.metrics.keys()
    assert "BLEU by sentence length" in (tmp_path / "run" / "report.html").read_text()
    tame.export(tmp_path / "run", tmp_path / "out")
    model = tame.load(tmp_path / "out")
    assert model(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)).shape == (1, 2, 300)
    assert main(["diagnose", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert ("Attention heads" in told) == (attention == "additive")
    assert "no call of attention" not in told
    again = {**values, "max_steps": 4, "stabilize": ["sigma_reparam"], "output_dir": str(tmp_path / "stable")}
    assert np.isfinite(tame.train("seq2seq-rnn", overrides=again).metrics["eval/loss"])


def test_bleu_by_length_is_of_the_sentences_of_that_length(tmp_path):
    short, long = [("a b", "x y z w v")] * 4, [("a b c d e f g h", "p q r s t u")] * 1
    translations = ["x y z w v"] * 4 + ["nothing of it at all here"]
    write_bleu_by_length(tmp_path, short + long, translations, "de")
    figure = json.loads((tmp_path / "figures" / "bleu-by-length.json").read_text())
    assert figure["x"] == [2, 2, 2, 2, 8]
    assert figure["lines"]["BLEU"][:4] == pytest.approx([100] * 4)
    assert figure["lines"]["BLEU"][4] < 10
