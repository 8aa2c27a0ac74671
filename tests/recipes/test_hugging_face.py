"""A run that begins from a Hugging Face folder ends as one: the library loads what was exported, with the run's outputs."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors.torch as safetensors
import torch

import tameformer as tame
from tameformer.errors import CheckpointError, ConfigError, DataError
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.config import ProbesConfig
from tameformer.training import checkpoint as checkpoints
from tameformer.training.checkpoint import load_model_tensors

transformers = pytest.importorskip("transformers")
WORDS = ("the", "day", "night", "fine", "poor", "warm", "cold")
TOKENS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 9, 10, 3]])


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"sentence": f"the {WORDS[3 + n % 4]} day", "label": n % 2} for n in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def fine_tuned(texts: Path, bert: Path, folder: Path, **changes) -> Path:
    values = {"data.path": str(texts), "init_from": str(bert), "max_steps": 4, "optim.peak_lr": 0.01, "precision": "fp32",
              "checkpoint.every": 2, "evals_per_epoch": None, "output_dir": str(folder),
              **{f"probes.{one.name}": None for one in fields(ProbesConfig)}}  # fmt: skip
    tame.train("text-classification", overrides={**values, **changes})
    return folder


def logits_of_the_run(folder: Path) -> torch.Tensor:
    recipe = resolve(str(folder))
    model = recipe.build(recipe.config, folder).model
    load_model_tensors(model, checkpoints.load(folder / "checkpoints" / "step-000004").model)
    return model.eval()(TOKENS).logits.detach()


CHANGES = {
    "plain": {},
    "all of finetune": {"finetune.mixout": 0.5, "finetune.prior_decay": 0.1, "finetune.layer_decay": 0.8},
    "a method": {"stabilize": ["sigma_reparam"]},
    "lora": {"finetune.lora_rank": 2},
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_the_library_loads_what_was_exported_with_the_outputs_of_the_run(name, texts, bert, tmp_path):
    if name == "lora":
        pytest.importorskip("peft")
    run = fine_tuned(texts, bert, tmp_path / "run", **CHANGES[name])
    tame.export(run, tmp_path / "out")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    found, expected = model.eval()(TOKENS).logits.detach(), logits_of_the_run(run)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    start = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()(TOKENS).logits
    assert (found - start).abs().max() > 1e-3
    read, given = (transformers.AutoTokenizer.from_pretrained(place) for place in (tmp_path / "out", bert))
    assert read("the warm night")["input_ids"] == given("the warm night")["input_ids"] == [2, 5, 10, 7, 3]


def test_the_folder_it_began_from_is_needed_no_more(texts, bert, tmp_path):
    moved = tmp_path / "bert"
    shutil.copytree(bert, moved)
    whole = fine_tuned(texts, moved, tmp_path / "run")
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(moved)
    recipe = resolve(str(cut))
    tame.train(str(cut), overrides={"output_dir": str(cut)}, resume="auto")
    first, second = (checkpoints.load(one / "checkpoints" / "step-000004").model for one in (whole, cut))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert recipe.config.init_from == str(moved)
    tame.export(cut, tmp_path / "out")


def test_a_run_is_an_intermediate_task(texts, bert, tmp_path):
    first = fine_tuned(texts, bert, tmp_path / "first")
    again = tame.load_pretrained(first, "text-classification")
    assert torch.equal(again(TOKENS).logits, logits_of_the_run(first))
    second = fine_tuned(texts, first, tmp_path / "second", max_steps=1, **{"optim.peak_lr": 1e-12})
    given, taken = (
        checkpoints.load(run / f"checkpoints/step-{step:06d}").model for run, step in ((first, 4), (second, 1))
    )
    for name, tensor in taken.items():
        torch.testing.assert_close(tensor, given[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(
        ConfigError, match=r"first does not fit.*classifier\.bias has shape \(2,\) there and \(3,\) here"
    ):
        fine_tuned(texts, first, tmp_path / "third", **{"data.num_classes": 3})


def test_what_such_a_folder_cannot_hold_is_refused(texts, bert, tmp_path):
    run = fine_tuned(texts, bert, tmp_path / "run", stabilize=["qk_norm"])
    with pytest.raises(CheckpointError, match="qk_norm cannot be folded into the weights of a Hugging Face model"):
        tame.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = run / "hugging_face" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["no_such_model"]}))
    with pytest.raises(CheckpointError, match="names no model that transformers here can build"):
        tame.export(run, tmp_path / "out")
    with pytest.raises(DataError, match=r"cannot be loaded for image-classification: .*BertConfig"):
        tame.train("vit-digits", overrides={"init_from": str(bert), "output_dir": str(tmp_path / "vit")})


def changed(bert: Path, folder: Path, change) -> Path:
    """A copy with other weights."""
    shutil.copytree(bert, folder)
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def with_a_pickle(folder: Path) -> None:
    torch.save(safetensors.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for file in [*folder.glob("*token*"), *folder.glob("vocab*")]:
        file.unlink()


def with_more_words(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"copy holds damaged weights: .*; copy or download it again"),
        (
            with_a_pickle,
            r"copy cannot be loaded for text-classification: .*; no pickle is read: write it again with save_pre",
        ),
        (without_tokenizer, r"copy holds no tokenizer; write it there with tokenizer\.save_pretrained"),
        (
            with_more_words,
            r"texts\.jsonl, line 3: the tokenizer of .*copy knows 'unheard' as number 12, but .* for 12 tokens",
        ),
    ],
)
def test_a_folder_that_is_no_sound_model_is_refused(damage, message, bert, tmp_path):
    shutil.copytree(bert, tmp_path / "copy")
    damage(tmp_path / "copy")
    rows = [{"sentence": "the day" if n != 2 else "the unheard day", "label": n % 2} for n in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        fine_tuned(tmp_path / "texts.jsonl", tmp_path / "copy", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_named(texts, bert, tmp_path):
    def break_one(tensors):
        tensors["bert.encoder.layer.1.output.dense.bias"][3] = torch.nan

    folder = changed(bert, tmp_path / "copy", break_one)
    with pytest.raises(
        ConfigError, match=r"copy holds weights that are not finite: bert\.encoder\.layer\.1\.output\.dense\.bias;"
    ):
        fine_tuned(texts, folder, tmp_path / "run")


def test_a_text_longer_than_the_positions_is_named(bert, tmp_path):
    """RoBERTa counts its positions from behind that of padding."""
    rows = [{"sentence": "the day " * (1 if n != 2 else 30), "label": n % 2} for n in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = {
        "vocab_size": 12,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    config = transformers.RobertaConfig(**small, max_position_embeddings=26, pad_token_id=0)
    for kind, given in (("Bert", transformers.BertConfig(**small, max_position_embeddings=25)), ("Roberta", config)):
        shutil.copytree(bert, tmp_path / kind)
        getattr(transformers, f"{kind}ForSequenceClassification")(given).save_pretrained(tmp_path / kind)
        told = rf"texts\.jsonl, line 3: the text has 62 tokens, but .*{kind} has positions for 25; .*--model\.max_length 25"
        with pytest.raises(DataError, match=told):
            fine_tuned(tmp_path / "texts.jsonl", tmp_path / kind, tmp_path / "run")
        fine_tuned(tmp_path / "texts.jsonl", tmp_path / kind, tmp_path / f"run-{kind}", **{"model.max_length": 25})
