"""From masked words to classes, on texts made here: what one recipe learns the other takes over with one key."""

import json
import os
import shutil
import signal
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tameformer as tame
from tameformer.errors import ConfigError, DataError
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder, Listener

GOOD, BAD = ("fine", "lovely", "bright", "warm"), ("poor", "dull", "cold", "grim")
SMALL = {
    "model.dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 2,
    "model.max_length": 24,
    "loop.logging_steps": 5,
    "precision": "fp32",
    **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
}


def sentence(generator, words):
    return " ".join(["the", *generator.choice(words, 4), "day", "and", *generator.choice(words, 3), "night"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    documents = [sentence(generator, GOOD if n % 2 else BAD) for n in range(300)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for split, count in (("train", 120), ("validation", 30)):
        rows = [{"sentence": sentence(generator, GOOD if n % 2 else BAD), "label": n % 2} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = [
            {"sentence1": row["sentence"], "sentence2": sentence(generator, GOOD), "label": row["label"]}
            for row in rows
        ]
        (folder / f"{split}-pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return folder


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mlm"
    values = {"data.path": str(data / "documents.jsonl"), "data.vocab_size": 320, "data.batch_size": 8, "max_steps": 60,
              "optim.peak_lr": 0.01, "loop.eval_steps": 60, "output_dir": str(folder)}  # fmt: skip
    train("masked-lm", overrides={**SMALL, **values})
    return folder


def classifier(data, output, **more):
    given = {"data.path": str(data / "train.jsonl"), "data.validation_path": str(data / "validation.jsonl"),
             "num_train_epochs": None, "max_steps": 20, "optim.peak_lr": 0.003, "output_dir": str(output)}  # fmt: skip
    return {**SMALL, **given, **more}


def weights(run: Path) -> dict:
    return load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def test_masked_words_are_learned(pretrained):
    lines = RunReader(pretrained).log()
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert {"eval/loss", "eval/accuracy", "eval/perplexity"} <= lines[-1].keys()
    assert "<mask>" in (pretrained / "tokenizer.json").read_text()


def test_the_encoder_is_taken_over_with_one_key(data, pretrained, tmp_path):
    values = classifier(data, tmp_path / "run", init_from=str(pretrained), **{"optim.peak_lr": 1e-12, "max_steps": 1})
    result = train("text-classification", overrides=values)
    given, taken = weights(pretrained), weights(tmp_path / "run")
    names = [name for name in taken if name.startswith("encoder.")]
    assert names == [name for name in given if name.startswith("encoder.")]
    assert all(torch.allclose(taken[name], given[name], atol=1e-6) for name in names)
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (pretrained / "tokenizer.json").read_text()
    assert {key for key in result.metrics if key.startswith("eval/")} == {
        "eval/loss", "eval/accuracy", "eval/f1", "eval/matthews"
    }  # fmt: skip


EVERYTHING = {
    "finetune.layer_decay": 0.8,
    "finetune.reinit_layers": 1,
    "finetune.mixout": 0.5,
    "finetune.prior_decay": 0.1,
    "finetune.unfreeze_steps": 4,
}


class Interrupt(Listener):
    def on_log(self, step, values):
        if step == 10:
            os.kill(os.getpid(), signal.SIGTERM)


def test_with_everything_on_it_learns_resumes_to_the_bit_and_is_exported(data, pretrained, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(pretrained, first)
    values = classifier(data, tmp_path / "straight", init_from=str(first), **EVERYTHING)
    train("text-classification", overrides=values)
    again = {**values, "output_dir": str(tmp_path / "stopped")}
    assert train("text-classification", overrides=again, listeners=[Interrupt()]).exit_code == 143
    shutil.rmtree(first)  # a run that goes on does not need it
    assert train("text-classification", overrides=again, resume="auto").finished
    hashes = [
        json.loads((CheckpointFolder(tmp_path / name).path(20) / "manifest.json").read_text())["files"]
        for name in ("straight", "stopped")
    ]
    assert hashes[0] == hashes[1]
    trained = weights(tmp_path / "straight")
    given = weights(pretrained)
    priors = [
        name for name in trained if name.endswith("_prior") and "layers.0" in name and name.endswith("bias_prior")
    ]
    assert priors
    assert all(torch.equal(trained[name], given[name.removesuffix("_prior")]) for name in priors)
    tame.export(tmp_path / "straight", tmp_path / "out")
    model = tame.load(tmp_path / "out")
    assert not any("prior" in name or "target" in name for name in model.state_dict())
    assert torch.equal(
        model.encoder.stack.layers[0].attention.branch.query.weight,
        trained["encoder.stack.layers.0.attention.branch.query.parametrizations.weight.original"],
    )


def test_it_learns_and_is_judged_several_times_an_epoch(data, pretrained, tmp_path):
    values = classifier(data, tmp_path / "run", init_from=str(pretrained), max_steps=40)
    result = train("text-classification", overrides=values)
    assert result.metrics["eval/accuracy"] > 0.9
    steps = [line["step"] for line in RunReader(tmp_path / "run").log() if "eval/loss" in line]
    assert steps == [*range(3, 40, 3), 40]  # 7 batches of 16 of 120 texts, 3 times an epoch
    assert (tmp_path / "run" / "BEST").is_file()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_low_rank_changes_are_folded_by_the_export(data, pretrained, tmp_path):
    pytest.importorskip("peft")
    more = {"finetune.lora_rank": 2, "finetune.layer_decay": 0.9, "max_steps": 3}
    train("text-classification", overrides=classifier(data, tmp_path / "run", init_from=str(pretrained), **more))
    trained, given = weights(tmp_path / "run"), weights(pretrained)
    name = "encoder.stack.layers.0.attention.branch.query"
    assert torch.equal(trained[f"{name}.base_layer.weight"], given[f"{name}.weight"])
    assert trained[f"{name}.lora_B.default.weight"].any()
    tame.export(tmp_path / "run", tmp_path / "out")
    change = trained[f"{name}.lora_B.default.weight"] @ trained[f"{name}.lora_A.default.weight"] * 16 / 2
    folded = tame.load(tmp_path / "out").get_parameter(f"{name}.weight")
    torch.testing.assert_close(folded, given[f"{name}.weight"] + change)


def test_frozen_layers_keep_their_bits(data, pretrained, tmp_path):
    values = classifier(data, tmp_path / "run", init_from=str(pretrained), **{"finetune.freeze_layers": 1})
    train("text-classification", overrides={**values, "max_steps": 3})
    given, trained = weights(pretrained), weights(tmp_path / "run")
    kept = {name for name in given if name in trained and torch.equal(given[name], trained[name])}
    assert {name for name in kept if ".layers.0." in name or "embedding" in name}
    assert not any(".layers.1." in name for name in kept)


def test_pairs_and_fresh_weights(data, tmp_path):
    values = classifier(data, tmp_path, **{"data.vocab_size": 320, "max_steps": 2, "evals_per_epoch": 3})
    values |= {
        f"data.{split}path": str(data / f"{name}-pairs.jsonl")
        for split, name in (("", "train"), ("validation_", "validation"))
    }
    train("text-classification", overrides=values)
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.fixture(scope="module")
def hugging_face(data, tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "day", "and", "night", *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_is_fine_tuned_alike(data, hugging_face, tmp_path):
    values = classifier(data, tmp_path / "run", init_from=str(hugging_face), **EVERYTHING)
    with pytest.raises(
        ConfigError, match=r"classifier\.bias has shape \(3,\) there and \(2,\) here.*--replace_head true"
    ):
        train("text-classification", overrides=values)
    values["replace_head"] = True
    assert train("text-classification", overrides=values).finished
    trained, given = weights(tmp_path / "run"), load_file(hugging_face / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.bias"
    assert torch.equal(trained[f"{name}_prior"], given[name])
    assert not any(name.startswith("classifier") and name.endswith("_prior") for name in trained)


def test_models_load_by_one_function(data, pretrained, hugging_face, tmp_path):
    from tameformer.errors import CheckpointError

    model = tame.load_pretrained(hugging_face, "text-classification")
    assert model.classifier.out_features == 3
    with pytest.raises(CheckpointError, match=r"classifier\.weight has shape \(3, 16\) there and \(5, 16\) here"):
        tame.load_pretrained(hugging_face, "text-classification", num_labels=5)
    replaced = tame.load_pretrained(hugging_face, "text-classification", num_labels=5, replace_head=True)
    assert torch.equal(replaced.bert.pooler.dense.weight, model.bert.pooler.dense.weight)

    ours = tame.load_pretrained(pretrained, "text-classification", num_labels=4)
    given = weights(pretrained)
    assert torch.equal(ours.encoder.embedding.weight, given["encoder.embedding.weight"])
    assert ours.head.out_features == 4
    tame.export(pretrained, tmp_path / "out")
    assert torch.equal(tame.load_pretrained(tmp_path / "out").transform.weight, given["transform.weight"])
    with pytest.raises(ValueError, match="was trained for something else than text-classification; give num_labels"):
        tame.load_pretrained(pretrained, "text-classification")


def test_a_body_that_does_not_fit_names_every_tensor(hugging_face, tmp_path):
    from tameformer.errors import CheckpointError

    for file in hugging_face.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(CheckpointError) as caught:
        tame.load_pretrained(tmp_path, "text-classification", replace_head=True)
    for layer in range(2):
        for name in ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight"):
            assert f"bert.encoder.layer.{layer}.{name} has shape" in str(caught.value)


def test_a_name_without_a_network_is_refused_in_two_seconds(monkeypatch):
    import time

    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.invalid")
    started = time.perf_counter()
    with pytest.raises(DataError, match=r"nobody/nothing is no folder here.*save_pretrained, and give that folder"):
        tame.load_pretrained("nobody/nothing", "text-classification")
    assert time.perf_counter() - started < 10  # with the import of transformers; alone it is one second
    with pytest.raises(DataError, match=r"is neither a folder nor a name on the hub"):
        tame.load_pretrained("/no/such/folder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evals_per_epoch": 2, "loop.eval_steps": 5}, "say the same in two ways"),
        ({"finetune.freeze_layers": 1, "finetune.unfreeze_steps": 2}, "give one"),
        ({"finetune.mixout": 0.5, "finetune.lora_rank": 2}, "leave finetune.mixout out"),
        ({"finetune.reinit_layers": 5}, "finetune: expected layers from 0 to 2"),
        ({"replace_head": True}, "replace_head is about the head of init_from"),
        ({"data.train_samples": 999}, "data.train_samples is 999, but there are 120 training texts"),
    ],
)
def test_what_contradicts_itself_is_refused(values, message, data, tmp_path):
    given = {**classifier(data, tmp_path / "run"), "data.vocab_size": 320, **values}
    with pytest.raises(ConfigError, match=message):
        train("text-classification", overrides={"evals_per_epoch": None, **given})
    assert not (tmp_path / "run").exists()


def test_a_label_that_training_does_not_know_is_named_by_its_line(data, tmp_path):
    rows = (data / "validation.jsonl").read_text().splitlines()
    rows[4] = json.dumps({"sentence": "the day", "label": 2})
    (tmp_path / "validation.jsonl").write_text("\n".join(rows) + "\n")
    values = classifier(data, tmp_path / "run", **{"data.validation_path": str(tmp_path / "validation.jsonl")})
    with pytest.raises(DataError, match=r"validation\.jsonl, line 5: label must be a class from 0 below 2, got 2"):
        train("text-classification", overrides=values)
    assert not (tmp_path / "run").exists()


def test_pairs_are_not_judged_by_single_texts(data, tmp_path):
    for learn, judge in (("train", "validation-pairs"), ("train-pairs", "validation")):
        files = {"data.path": str(data / f"{learn}.jsonl"), "data.validation_path": str(data / f"{judge}.jsonl")}
        with pytest.raises(
            DataError, match=rf"{learn}\.jsonl, line 1: .*, but .*{judge}\.jsonl, line 1: .*; give files of one"
        ):
            train("text-classification", overrides=classifier(data, tmp_path / "run", **files))
    assert not (tmp_path / "run").exists()


def test_a_class_that_the_chosen_texts_do_not_have_is_one_all_the_same(data, tmp_path):
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    rows[-1]["label"] = 2
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "validation.jsonl").write_text(json.dumps(rows[-1]) + "\n")
    files = {"data.path": str(tmp_path / "train.jsonl"), "data.validation_path": str(tmp_path / "validation.jsonl")}
    values = classifier(
        data, tmp_path / "run", **files, **{"data.train_samples": 5, "data.batch_size": 5, "max_steps": 1}
    )
    result = train("text-classification", overrides=values)
    assert result.finished
    assert weights(tmp_path / "run")["head.weight"].shape[0] == 3


def test_noise_is_on_the_training_tokens_only_and_resumes_to_the_bit(data, tmp_path):
    noise = {"data.token_dropout": 0.3, "data.token_deletion": 0.2, "data.token_swap": 2}
    values = classifier(data, tmp_path / "straight", max_steps=12, **noise)
    recipe = resolve("text-classification", values)
    run = recipe.build(recipe.config, tmp_path / "unused")
    (batch,) = next(iter(run.batches(start=0, stop=1, rank=0, world_size=1)))
    plain = resolve("text-classification", {**values, "data.token_deletion": 0.0, "data.token_swap": 0})
    (kept,) = next(iter(plain.build(plain.config, tmp_path / "unused").batches(start=0, stop=1, rank=0, world_size=1)))
    mask = json.loads(run.artifacts["tokenizer.json"])["added_tokens"][-1]
    assert mask["content"] == "<mask>"
    words = kept["tokens"][kept["tokens"] > 2]  # beyond padding, begin and end
    assert 0.15 < (words == mask["id"]).float().mean() < 0.45
    assert 0.6 < batch["real"].sum() / kept["real"].sum() < 0.95
    assert (batch["tokens"][:, 0] == kept["tokens"][:, 0]).all()  # what begins a text stays

    train("text-classification", overrides=values)
    again = {**values, "output_dir": str(tmp_path / "paused")}
    train("text-classification", overrides={**again, "loop.pause_after": 0.5})
    train("text-classification", overrides=again, resume="auto")
    hashes = [
        json.loads((CheckpointFolder(tmp_path / name).path(12) / "manifest.json").read_text())["files"]
        for name in ("straight", "paused")
    ]
    assert hashes[0] == hashes[1]
    with pytest.raises(ConfigError, match=r"data.token_swap was 2 and is 3"):
        train("text-classification", overrides={**again, "data.token_swap": 3}, resume="auto")


@pytest.mark.parametrize(("key", "value"), [("mixout", 0.5), ("prior_decay", 0.1), ("reinit_layers", 1)])
def test_what_is_held_to_other_weights_cannot_change_in_a_resume(key, value, data, tmp_path):
    values = classifier(data, tmp_path / "run", max_steps=4)
    train("text-classification", overrides={**values, "loop.pause_after": 0.5})
    with pytest.raises(ConfigError, match=f"belongs to another configuration: finetune.{key} was None and is {value}"):
        train("text-classification", overrides={**values, f"finetune.{key}": value}, resume="auto")


@pytest.mark.parametrize(
    ("architecture", "method"), [("cnn", "sigma_reparam"), ("lstm", None), ("gru", None), ("set", "sigma_reparam")]
)
def test_other_networks_learn_in_the_same_run_and_are_exported(architecture, method, data, tmp_path):
    values = classifier(data, tmp_path / "run", **{"model.architecture": architecture, "max_steps": 40})
    values = {key: value for key, value in values.items() if key not in ("model.num_heads", "model.num_layers")}
    values |= {"optim.peak_lr": 0.01, "stabilize": [method] if method else []}
    assert train("text-classification", overrides=values).metrics["eval/accuracy"] > 0.9
    tame.export(tmp_path / "run", tmp_path / "out")
    assert tame.load(tmp_path / "out")(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 2)


def test_other_networks_start_from_nothing(data, tmp_path):
    values = classifier(data, tmp_path / "run", init_from="somewhere", **{"model.architecture": "cnn"})
    values = {key: value for key, value in values.items() if key not in ("model.num_heads", "model.num_layers")}
    with pytest.raises(
        ConfigError, match=r"init_from brings .* Transformer, but model\.architecture is cnn; leave one"
    ):
        train("text-classification", overrides=values)
