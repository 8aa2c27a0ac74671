"""What is exported is what the run had: real runs of every task, exported, loaded, compared; and what is refused."""

import inspect
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data.sources import digits
from tameformer.data.tokenizers import BPETokenizer, CharTokenizer
from tameformer.errors import CheckpointError, ConfigError
from tameformer.models import BUILDERS, Architecture
from tameformer.recipes import catalogue
from tameformer.recipes.config import ProbesConfig
from tameformer.training import checkpoint as checkpoints
from tameformer.training.checkpoint import load_model_tensors

WORDS = ("ein", "mann", "geht", "hund", "rot", "blau", "und", "haus")
SMALL = {
    "model.dim": 16, "model.num_heads": 2, "max_steps": 4, "precision": "fp32", "optim.peak_lr": 0.05,
    "optim.warmup_steps": 1, "checkpoint.every": 2, **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = [" ".join(WORDS[(3 * index + i) % 8] for i in range(1 + index % 7)) for index in range(80)]
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    (folder / "books.jsonl").write_text("".join(json.dumps({"text": line * 3}) + "\n" for line in lines))
    for split in ("train", "val"):
        (folder / f"{split}.en").write_text("\n".join(lines) + "\n")
        (folder / f"{split}.de").write_text("\n".join(line.upper() for line in lines) + "\n")
    return folder


def settings(task: str, data: Path) -> dict:
    return SMALL | {
        "vit-digits": {"model.num_layers": 2},
        "char-lm": {"data.path": str(data / "text.txt"), "model.num_layers": 2, "model.max_length": 32},
        "lm": {"data.path": str(data / "books.jsonl"), "data.vocab_size": 300, "model.num_layers": 2,
               "data.batch_size": 4, "model.max_length": 32},
        "translation": {"data.path": str(data / "train"), "data.validation_path": str(data / "val"),
                        "data.vocab_size": 300, "data.max_tokens": 600, "model.num_encoder_layers": 2,
                        "model.num_decoder_layers": 2, "decoding.num_beams": 1},
    }[task]  # fmt: skip


METHODS = {
    "plain": ([], "pre"),
    "sigma_reparam": (["sigma_reparam"], "pre"),
    "admin": (["admin"], "post"),
    "layer_scale": ([{"layer_scale": {"init": 0.5}}], "pre"),
    "peri_norm": (["peri_norm"], "pre"),
}


def trained(task: str, data: Path, folder: Path, **changes) -> Path:
    tame.train(task, overrides={**settings(task, data), **changes, "output_dir": str(folder)})
    return folder


def the_runs_own(folder: Path, step: int = 4, *, average: bool = False):
    """The model of a run with its patches on, built by the recipe from its data, and a batch."""
    recipe = catalogue.resolve(str(folder))
    run = recipe.build(recipe.config, folder)
    snapshot = checkpoints.load(folder / f"checkpoints/step-{step:06d}")
    model = run.model
    if average:
        averaged = AveragedModel(model, use_buffers=True)
        load_model_tensors(averaged, snapshot.average)
        model = averaged.module
    else:
        load_model_tensors(model, snapshot.model)
    (batch, *_) = next(iter(run.batches(start=0, stop=1, rank=0, world_size=1)))
    return model.eval(), batch


def outputs(model, batch):
    with torch.no_grad():
        if "images" in batch:
            return model(batch["images"])
        if "tokens" in batch:
            return model(batch["tokens"])
        return model(batch["source"], batch["target_in"], source_mask=batch["source_mask"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["vit-digits", "char-lm", "lm", "translation"])
def test_the_exported_model_is_the_runs_model(task, method, data, tmp_path):
    methods, residual = METHODS[method]
    run = trained(task, data, tmp_path / "run", **{"stabilize": methods, "model.residual": residual})
    done = tame.export(run, tmp_path / "out")
    own, batch = the_runs_own(run, average=done.weights == "ema")  # the translation recipe averages
    model = tame.load(tmp_path / "out")
    expected, found = outputs(own, batch), outputs(model, batch)
    assert not model.training
    assert expected.std() > 0.01
    if method in ("plain", "peri_norm"):
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    names = [next(iter(one)) if isinstance(one, dict) else one for one in methods]
    assert done.kept == (("peri_norm",) if method == "peri_norm" else ())
    assert done.folded == tuple(name for name in names if name != "peri_norm")
    values = json.loads((tmp_path / "out/config.json").read_text())
    fresh = Architecture.from_plain(values["model"]).build().state_dict()
    extra = load_file(tmp_path / "out/model.safetensors").keys() ^ fresh.keys()
    assert all(".out_norm." in name for name in extra)
    assert bool(extra) == (method == "peri_norm")
    assert values["norm_eps"] == {}
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()
    if task != "vit-digits":
        tokenizer = (CharTokenizer if task == "char-lm" else BPETokenizer).load(tmp_path / "out/tokenizer.json")
        assert tokenizer.vocab_size == found.shape[-1]


@pytest.mark.parametrize(
    ("methods", "residual", "kept"),
    [
        (["deepnorm"], "post", ()),
        ([{"admin": {"trainable": False}}], "post", ()),
        (["t_fixup"], "post", ()),
        ([{"sigma_reparam": {"remove_norms": True}}], "pre", ()),
        (["admin", "sigma_reparam", "z_loss"], "post", ()),
        (["sigma_reparam", "layer_scale"], "pre", ()),
        (["sigma_reparam", "layer_scale", "rezero"], "pre", ("layer_scale", "rezero")),  # each would go after the other
        (["depth_scaled_init", "peri_norm", "sigma_reparam", {"qk_norm": {"norm": "layer_norm"}}], "pre",
         ("peri_norm", "qk_norm")),
        ([{"admin": {"train_first": True}}, "sigma_reparam"], "post", ("admin",)),
        ([{"soft_cap": {"cap": 2.0}}, {"qk_clip": {"threshold": 0.5}}], "pre", ("soft_cap",)),
    ],
    ids=str,
)  # fmt: skip
def test_methods_together_and_what_no_tensor_says(methods, residual, kept, data, tmp_path):
    small = {"stabilize": methods, "model.residual": residual, "model.norm": "layer_norm"}
    run = trained("char-lm", data, tmp_path / "run", **small)
    done = tame.export(run, tmp_path / "out")
    own, batch = the_runs_own(run)
    torch.testing.assert_close(outputs(tame.load(tmp_path / "out"), batch), outputs(own, batch), rtol=1e-5, atol=1e-5)
    assert done.kept == kept


def test_deepnorms_epsilon_is_in_the_configuration(data, tmp_path):
    """Without it the outputs would differ, and more so the smaller the embeddings."""
    run = trained("char-lm", data, tmp_path / "run", **{"stabilize": ["deepnorm"], "model.residual": "post"})
    tame.export(run, tmp_path / "out")
    own, batch = the_runs_own(run)
    file = tmp_path / "out/config.json"
    values = json.loads(file.read_text())
    alpha = (2 * 2) ** 0.25
    assert values["norm_eps"] == {"stack.layers.0.attention.norm": pytest.approx(1e-5 / alpha**2)}
    with_eps = (outputs(tame.load(tmp_path / "out"), batch) - outputs(own, batch)).abs().max()
    file.write_text(json.dumps({**values, "norm_eps": {}}))
    without = (outputs(tame.load(tmp_path / "out"), batch) - outputs(own, batch)).abs().max()
    assert with_eps < 1e-5
    assert without > 5 * with_eps


def test_the_average_is_exported_where_the_run_evaluated_it(data, tmp_path):
    changes = {"optim.ema_decay": 0.5, "stabilize": ["sigma_reparam"], "checkpoint.best_metric": "eval/loss",
               "loop.eval_steps": 2}  # fmt: skip
    run = trained("vit-digits", data, tmp_path / "run", **changes)
    found = {}
    for name, options in (("default", {}), ("raw", {"weights": "raw"}), ("best", {"best": True, "weights": "ema"})):
        done = tame.export(run, tmp_path / name, **options)
        found[name] = tame.load(tmp_path / name)
        assert done.weights == ("raw" if name == "raw" else "ema")
        best = int((run / "BEST").read_text().strip().removeprefix("step-"))
        step = best if name == "best" else 4
        assert done.step == step
        own, batch = the_runs_own(run, step, average=name != "raw")
        torch.testing.assert_close(outputs(found[name], batch), outputs(own, batch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs(found["default"], batch), outputs(found["raw"], batch), atol=1e-3)
    tame.export(run / "checkpoints/step-000002", tmp_path / "earlier", weights="raw")
    own, batch = the_runs_own(run, 2)
    torch.testing.assert_close(outputs(tame.load(tmp_path / "earlier"), batch), outputs(own, batch))


def test_the_folder_says_how_images_become_input(data, tmp_path):
    result = tame.train("vit-digits", overrides={**SMALL, "max_steps": 40, "output_dir": str(tmp_path / "run")})
    tame.export(tmp_path / "run", tmp_path / "out")
    model, told = tame.load(tmp_path / "out"), json.loads((tmp_path / "out/preprocessing.json").read_text())
    test = digits("test")
    shape = (-1, 1, 1)
    mean, std = np.array(told["mean"]).reshape(shape), np.array(told["std"]).reshape(shape)
    images = torch.tensor((test.images / told["divide_by"] - mean) / std, dtype=torch.float32)
    accuracy = (model(images).argmax(-1).numpy() == test.labels).mean()
    assert accuracy == result.metrics["eval/accuracy"]
    assert accuracy > 0.2
    assert told["image_shape"] == [1, 8, 8]


def test_neither_data_nor_recipe_are_needed(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    run = trained(
        "translation", tmp_path / "data", tmp_path / "run", **{"model.residual": "post", "stabilize": ["admin"]}
    )
    own, batch = the_runs_own(run, average=True)
    shutil.rmtree(tmp_path / "data")
    tame.export(run, tmp_path / "out")
    shutil.rmtree(run)
    before = torch.random.get_rng_state()
    model = tame.load(tmp_path / "out")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(outputs(model, batch), outputs(own, batch), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    methods = ["sigma_reparam", "peri_norm"][::-1]
    return trained("char-lm", data, tmp_path_factory.mktemp("runs") / "run", stabilize=methods)


def rewritten(out: Path, change) -> None:
    values = json.loads((out / "config.json").read_text())
    change(values)
    (out / "config.json").write_text(json.dumps(values))


NORM = "stack.layers.0.attention.norm"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(code="os.system"), "the key code is unknown"),
        (lambda v: v.pop("norm_eps"), "the key norm_eps is missing"),
        (lambda v: v.update(format="tameformer-9"), "was not written by `tame export`"),
        (lambda v: v.update(model_type="bert", format=None), "transformers.AutoModel.from_pretrained reads it"),
        (lambda v: v["model"].update(builder="os.system"), "there is no model os.system; did you mean"),
        (lambda v: v["model"].update(more=1), "expected a builder with its config and arguments"),
        (lambda v: v["model"]["config"].update(dimm=1), "unknown key dimm; did you mean dim"),
        (lambda v: v["model"]["config"].update(dim="x"), "dim expects int, got x"),
        (lambda v: v["model"]["config"].update(norm="evil"), "norm expects one of"),
        (lambda v: v["model"]["arguments"].update(initialize="x"), "the argument initialize is unknown"),
        (lambda v: v["model"]["arguments"].pop("vocab_size"), "the argument vocab_size is missing"),
        (lambda v: v["model"]["arguments"].update(vocab_size="9"), "vocab_size expects int, got '9'"),
        (lambda v: v["model"]["arguments"].update(vocab_size=-1), "vocab_size of at least 1, got -1"),
        (lambda v: v["model"]["arguments"].update(vocab_size=900), "embedding.weight has shape"),
        (lambda v: v.update(stabilize=["peri"]), "there is no method peri"),
        (lambda v: v.update(stabilize=["admin"]), "a method took a profile"),
        (lambda v: v.update(stabilize=[]), "out_norm.weight is not part of the model"),
        (lambda v: v.update(stabilize={}), "stabilize to be a list"),
        (lambda v: v.update(stabilize=[3]), "expected one method an item, got 3"),
        (lambda v: v.update(removed_norms=["stack.layers.0"]), "names of norms of the model"),
        (lambda v: v.update(removed_norms=[NORM]), f"{NORM}.weight is not part of the model"),
        (lambda v: v.update(norm_eps={"nowhere": 1e-5}), "got 'nowhere'"),
        (lambda v: v.update(norm_eps={NORM: "1"}), "a number above 0, got '1'"),
        (lambda v: v.update(norm_eps=3), "norm_eps"),
    ],
)
def test_a_changed_configuration_is_refused_by_name(change, message, run, tmp_path):
    tame.export(run, tmp_path / "out")
    rewritten(tmp_path / "out", change)
    with pytest.raises(CheckpointError) as error:
        tame.load(tmp_path / "out")
    assert message in str(error.value)


def test_missing_cut_and_foreign_files_are_refused(run, tmp_path):
    out = tmp_path / "out"
    tame.export(run, out)
    tensors = load_file(out / "model.safetensors")
    name = "stack.layers.0.attention.norm.weight"
    save_file({key: one for key, one in tensors.items() if key != name}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        tame.load(out)
    save_file({**tensors, name: torch.ones(3)}, out / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(3,\) in the checkpoint and \(16,\) in the model"):
        tame.load(out)
    (out / "model.safetensors").write_bytes(b"\x80\x04pickle?")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        tame.load(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        tame.load(out)
    (out / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        tame.load(out)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        tame.load(tmp_path / "nowhere")


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    file = copied / "checkpoints/step-000004/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["export", str(copied), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "step-000004 is damaged" in shown.err
    assert "out: step 2, the weights; sigma_reparam folded in; peri_norm kept" in shown.out
    shutil.rmtree(copied / "checkpoints/step-000002")
    assert main(["export", str(copied), str(tmp_path / "other")]) == 1
    assert "holds no sound checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "out"], 2, "nowhere does not exist; give a run folder"),
        (["RUN", "full"], 2, "full exists and is no empty folder"),
        (["RUN", "full/file"], 2, "full/file exists and is no empty folder"),
        (["RUN", "a/b"], 1, "there is no folder"),
        (["full", "out"], 1, "full holds no sound checkpoint"),
        (["RUN", "out", "--best"], 1, "names no best checkpoint; it is kept with checkpoint.best_metric"),
        (["RUN", "out", "--weights", "ema"], 1, "holds no moving average"),
        (["RUN", "out", "--weights", "mean"], 2, "invalid choice"),
        (["RUN"], 2, "the following arguments are required: OUT"),
    ],
)
def test_wrong_usage_is_refused_in_plain_words_and_leaves_nothing(
    arguments, code, message, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    assert main(["export", *(str(run) if word == "RUN" else word for word in arguments)]) == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (tmp_path / "full/file").read_text() == "mine"


def test_a_run_folder_without_what_is_needed_is_told_apart(run, data, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "model.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model\.json.*--resume auto"):
        tame.export(copied, tmp_path / "out")
    tame.train(str(copied), overrides={"output_dir": str(copied)}, resume="auto")
    assert tame.export(copied, tmp_path / "out").step == 4
    model = (copied / "model.json").read_text()
    (copied / "model.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"model\.json cannot be read"):
        tame.export(copied, tmp_path / "other")
    (copied / "model.json").write_text(model)
    (copied / "BEST").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint of this run"):
        tame.export(copied, tmp_path / "other", best=True)
    (copied / "config.yaml").write_text("task: vision\nsede: 1\n")
    with pytest.raises(ConfigError, match="unknown key sede"):
        tame.export(copied, tmp_path / "other")
    admin = trained("vit-digits", data, tmp_path / "admin", **{"stabilize": ["admin"], "model.residual": "post"})
    (admin / "profile.json").unlink()
    with pytest.raises(CheckpointError, match=r"there is no profile\.json"):
        tame.export(admin, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "out").mkdir()
    tame.export(run, tmp_path / "out")
    assert tame.load(tmp_path / "out") is not None


STOPPED = """
import os, signal, sys
from tameformer.cli.__main__ import main
from tameformer.recipes import exported

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts tests in the background ignores it
written = exported.save_file
def save_then_interrupt(*arguments):
    written(*arguments)
    os.kill(os.getpid(), signal.SIGINT)

exported.save_file = save_then_interrupt
sys.exit(main(["export", *sys.argv[1:]]))
"""


def test_ctrl_c_in_the_middle_of_writing_leaves_nothing(run, tmp_path):
    done = subprocess.run([sys.executable, "-c", STOPPED, str(run), str(tmp_path / "out")], timeout=120)
    assert done.returncode == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [1.5, 4.0])
def test_a_signal_at_any_time_leaves_all_or_nothing(seconds, run, tmp_path):
    command = [sys.executable, "-m", "tameformer.cli", "export", str(run), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    names = [path.name for path in tmp_path.iterdir()]
    assert names in ([], ["out"])
    if names:
        tame.load(tmp_path / "out")


def test_diagnose_says_what_an_exported_folder_lacks(run, tmp_path, capsys):
    tame.export(run, tmp_path / "out")
    assert main(["diagnose", str(tmp_path / "out")]) == 1
    assert "was exported without its data; diagnose the run instead" in capsys.readouterr().err


@pytest.mark.parametrize("builder", BUILDERS)
def test_every_builder_goes_through_plain_values(builder):
    told = {"vocab_size": 20, "padding_id": 0, "num_classes": 3, "image_size": (8, 4), "channels": 1, "num_features": 8}
    told |= {"num_frames": 4, "input_size": 3}
    wanted = inspect.signature(BUILDERS[builder][0]).parameters.values()
    arguments = {
        one.name: told[one.name] for one in wanted if one.kind is one.KEYWORD_ONLY and one.default is one.empty
    }
    config_class = BUILDERS[builder][1]
    small = {"dim": 16, "num_heads": 2, "widths": (8, 16)}
    known = {name: value for name, value in small.items() if name in config_class.__dataclass_fields__}
    made = Architecture(builder, config_class(**known), arguments)
    again = Architecture.from_plain(json.loads(json.dumps(made.to_plain())))
    assert again == made
    assert again.build().state_dict().keys() == made.build().state_dict().keys()


def test_an_architecture_of_the_wrong_kind_is_refused():
    with pytest.raises(ConfigError, match="image_size expects int or a list of 2 x int, got 'big'"):
        Architecture.from_plain(
            {"builder": "vision_classifier", "config": {},
             "arguments": {"num_classes": 3, "image_size": "big", "channels": 1}}
        )  # fmt: skip
