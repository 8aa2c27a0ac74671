import json

import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "digits"
    tame.train("vit-digits", overrides={"max_steps": 4, "output_dir": str(folder), "model.dim": 16})
    return folder


def test_a_run_is_diagnosed_at_its_checkpoint(run_folder, tmp_path, capsys):
    page, whole = tmp_path / "health.html", tmp_path / "health.json"
    assert main(["diagnose", str(run_folder), "--html", str(page), "--json", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint of step 4" in printed
    assert "Attention heads" in printed
    values = json.loads(whole.read_text())["values"]
    assert {"update_ratio", "grad_norm", "attention_entropy", "amplification_gradient"} <= {
        key.split("/")[1] for key in values
    }
    assert page.read_text().startswith("<!doctype html>")


def test_one_of_its_checkpoints_can_be_named(run_folder, capsys):
    (checkpoint,) = (run_folder / "checkpoints").iterdir()
    assert main(["diagnose", str(checkpoint), "--rows", "1"]) == 0
    assert "more rows" in capsys.readouterr().out


def save_bert(folder, *, tokenizer):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    if tokenizer:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "so", "it", "goes"]
        (folder / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)


def test_a_hugging_face_folder_is_diagnosed_on_random_input(tmp_path, capsys):
    save_bert(tmp_path, tokenizer=False)
    assert main(["diagnose", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "on random input" in printed
    assert "bert.encoder.layer.0" in printed
    assert "no optimizer was given" in printed


def test_a_hugging_face_folder_is_diagnosed_on_a_text(tmp_path, capsys):
    save_bert(tmp_path / "bert", tokenizer=True)
    (tmp_path / "notes.txt").write_text("so it goes\n\nit goes so it goes\n")
    assert main(["diagnose", str(tmp_path / "bert"), "--text", str(tmp_path / "notes.txt")]) == 0
    assert "on notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "nowhere does not exist; give a run folder"),
        (["."], 1, "holds no sound checkpoint"),
        ([".", "--json", "nowhere/x.json"], 2, "there is no folder nowhere; create it"),
        ([], 2, "MODEL_OR_RUN"),
    ],
)
def test_wrong_use_says_what_to_do(arguments, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *arguments]) == code
    assert message in capsys.readouterr().err


def test_help_has_examples(capsys):
    assert main(["diagnose", "--help"]) == 0
    assert "tame diagnose runs/char-lm" in capsys.readouterr().out
