"""Every task learns in a few steps on data made here, twice the same, and resumes to the same bits."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder, Listener

WORDS = ("ein", "mann", "geht", "hund", "rot", "blau", "und", "haus", "baum", "sieht", "kind", "klein")


def sentence(generator, length):
    return " ".join(generator.choice(WORDS, length))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 120)
    documents = [sentence(generator, int(generator.integers(5, 60))) for _ in range(60)]
    (folder / "books.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for split, count in (("train", 200), ("val", 20)):
        sources = [sentence(generator, int(generator.integers(2, 9))) for _ in range(count)]
        (folder / f"{split}.en").write_text("\n".join(sources) + "\n")
        (folder / f"{split}.de").write_text("\n".join(text.upper() for text in sources) + "\n")
    labels = generator.integers(0, 2, 120)
    images = (generator.integers(0, 128, (120, 8, 8)) + 100 * labels[:, None, None]).astype(np.uint8)
    np.savez(folder / "train.npz", x=images[:100], y=labels[:100])
    np.savez(folder / "test.npz", x=images[100:], y=labels[100:])
    return folder


def overrides(task: str, data: Path) -> dict:
    small = {"model.dim": 16, "model.num_heads": 2, "loop.logging_steps": 5, "precision": "fp32", "optim.peak_lr": 0.01}
    return small | {
        "char-lm": {"data.path": str(data / "text.txt"), "model.num_layers": 1, "max_steps": 40, "model.max_length": 32,
                    "optim.warmup_steps": 5, "loop.eval_steps": 20},
        "lm": {"data.path": str(data / "books.jsonl"), "data.vocab_size": 300, "model.num_layers": 1, "max_steps": 40,
               "data.batch_size": 8, "model.max_length": 32},
        "translation": {"data.path": str(data / "train"), "data.validation_path": str(data / "val"), "max_steps": 40,
                        "data.vocab_size": 300, "data.max_tokens": 600, "model.num_encoder_layers": 1,
                        "model.num_decoder_layers": 1, "decoding.eval_sentences": 5, "loop.eval_steps": 20,
                        "model.dropout": 0.1},
        "vit": {"data.path": str(data), "model.num_layers": 1, "max_steps": 40, "data.batch_size": 20,
                "data.augment": ["shift", "flip", "erasing"], "data.cutmix_alpha": 1.0, "data.mixup_alpha": 0.2},
    }[task]  # fmt: skip


METRICS = {
    "char-lm": {"eval/loss", "eval/perplexity"},
    "lm": {"eval/loss", "eval/perplexity", "eval/perplexity_per_byte", "eval/bits_per_byte"},
    "translation": {
        "eval/loss",
        "eval/perplexity",
        "eval/bleu",
        "eval/bleu_lowercased",
        "eval/bleu_tokenized",
        "test/bleu",
        "test/bleu_lowercased",
        "test/bleu_tokenized",
    },
    "vit": {"eval/loss", "eval/accuracy"},
}


class Interrupt(Listener):
    def on_log(self, step, values):
        if step == 25:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("task", list(METRICS))
def test_learns_and_resumes_exactly(task, data, tmp_path):
    values = overrides(task, data)
    straight = train(task, overrides={**values, "output_dir": str(tmp_path / "straight")})
    losses = [line["train/loss"] for line in RunReader(tmp_path / "straight").log() if "train/loss" in line]
    assert losses[-1] < 0.9 * losses[0]
    assert {key for key in straight.metrics if key.startswith(("eval/", "test/"))} == METRICS[task]

    again = {**values, "output_dir": str(tmp_path / "stopped")}
    assert train(task, overrides=again, listeners=[Interrupt()]).exit_code == 143
    resumed = train(task, overrides=again, resume="auto")
    assert resumed.finished
    hashes = [
        json.loads((CheckpointFolder(tmp_path / name).path(40) / "manifest.json").read_text())["files"]
        for name in ("straight", "stopped")
    ]
    assert hashes[0] == hashes[1]


def test_the_tokenizer_stays_with_the_run(data, tmp_path):
    train("lm", overrides={**overrides("lm", data), "max_steps": 2, "output_dir": str(tmp_path)})
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"


def test_the_signatures_of_bleu_stay_with_the_run(data, tmp_path):
    values = {**overrides("translation", data), "max_steps": 1, "decoding.eval_sentences": None}
    metrics = train("translation", overrides={**values, "output_dir": str(tmp_path)}).metrics
    signatures = json.loads((tmp_path / "bleu.json").read_text())
    assert {key.removeprefix("test/") for key in metrics if key.startswith("test/")} == set(signatures) - {"words"}
    assert "|case:mixed|eff:no|tok:13a|smooth:exp|version:" in signatures["bleu"]


def test_best_checkpoint_and_early_stopping(tmp_path):
    result = train(
        "vit-digits",
        overrides={
            "output_dir": str(tmp_path), "max_steps": 60, "loop.eval_steps": 5, "model.dim": 16, "optim.peak_lr": 1e-9,
            "optim.schedule": "constant", "checkpoint.best_metric": "eval/loss", "loop.early_stopping_patience": 2,
            "optim.warmup_steps": 0, "checkpoint.keep_last": 1, "optim.name": "sgd", "optim.momentum": 0.0,
        },
    )  # fmt: skip
    # Nothing can be learned at this rate: the first evaluation, or one of rounding's, stays the best.
    assert result.step < 60
    best = (tmp_path / "BEST").read_text().strip()
    assert (tmp_path / "checkpoints" / best / "model.safetensors").is_file()
    (finish,) = [event for event in RunReader(tmp_path).events() if event["kind"] == "finish"]
    assert f"eval/loss was best at step {int(best.removeprefix('step-'))}" in finish["message"]


@pytest.mark.parametrize(("keep_last", "gone"), [(1, 14), (5, 4)])
def test_as_many_of_the_newest_checkpoints_stay_as_were_asked_for(keep_last, gone, tmp_path):
    values = {"max_steps": 16, "model.dim": 16, "model.num_layers": 1, "optim.warmup_steps": 1, "loop.eval_steps": 16}
    more = {"checkpoint.every": 2, "checkpoint.keep_last": keep_last, "output_dir": str(tmp_path)}
    train("vit-digits", overrides={**values, **more})
    steps = CheckpointFolder(tmp_path).steps()
    assert steps[-keep_last:] == list(range(18 - 2 * keep_last, 18, 2))
    assert gone not in steps


def test_an_unknown_best_metric_names_those_there_are(tmp_path):
    with pytest.raises(
        Exception, match=r"checkpoint\.best_metric is eval/acc, which is not measured; choose one of eval/acc"
    ):
        train(
            "vit-digits", overrides={"output_dir": str(tmp_path), "max_steps": 2, "checkpoint.best_metric": "eval/acc"}
        )
