"""The image recipe with a Vision Transformer of Hugging Face: handed over, fine-tuned, diagnosed, resumed, and given back."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.errors import ConfigError
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.config import ProbesConfig
from tameformer.training import checkpoint as checkpoints
from tameformer.training.checkpoint import load_model_tensors

transformers = pytest.importorskip("transformers")
MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Grey images of 8 x 8 pixels of two classes, dark and bright."""
    folder, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 2
        images = generator.integers(0, 128, (count, 8, 8)) + 120 * labels[:, None, None]
        np.savez(folder / f"{split}.npz", x=images.astype(np.uint8), y=labels)
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """One for coloured images of 16 x 16 pixels, trained for five classes."""
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


def values(data: Path, vit: Path, folder: Path, **changes) -> dict:
    return {
        "data.path": str(data), "data.batch_size": 20, "data.augment": [], "init_from": str(vit), "replace_head": True,
        "max_steps": 4, "optim.warmup_steps": 1, "optim.peak_lr": 0.01, "optim.ema_decay": None, "precision": "fp32",
        "checkpoint.every": 2, "output_dir": str(folder),
        **{f"probes.{one.name}": None for one in fields(ProbesConfig)}, **changes,
    }  # fmt: skip


def model_of(folder: Path, step: int) -> torch.nn.Module:
    recipe = resolve(str(folder))
    model = recipe.build(recipe.config, folder).model
    load_model_tensors(model, checkpoints.load(folder / "checkpoints" / f"step-{step:06d}").model)
    return model.eval()


def test_the_library_loads_what_was_fine_tuned_and_the_run_needs_its_beginning_no_more(data, vit, tmp_path, capsys):
    moved = tmp_path / "vit"
    shutil.copytree(vit, moved)
    result = tame.train("vit", overrides=values(data, moved, tmp_path / "run", max_steps=30))
    assert result.metrics["eval/accuracy"] > 0.9
    tame.export(tmp_path / "run", tmp_path / "out")
    again, info = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    pixels = torch.rand(3, 3, 16, 16)
    expected = model_of(tmp_path / "run", 30)(pixel_values=pixels).logits
    torch.testing.assert_close(again.eval()(pixel_values=pixels).logits, expected)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_std"] == STD

    shutil.rmtree(moved)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", cut)
    shutil.rmtree(cut / "checkpoints" / "step-000030")
    tame.train(str(cut), overrides={"output_dir": str(cut)}, resume="auto")
    first, second = (checkpoints.load(one / "checkpoints/step-000030").model for one in (tmp_path / "run", cut))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert main(["diagnose", str(cut)]) == 0
    assert "Attention heads" in capsys.readouterr().out


def test_images_come_as_the_model_was_trained_to_see_them(data, vit, tmp_path):
    found = resolve("vit", values(data, vit, tmp_path, max_steps=1, **{"optim.warmup_steps": 0}))
    run = found.build(found.config, tmp_path)
    (batch,) = next(iter(run.batches(start=0, stop=1, rank=0, world_size=1)))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))
    with np.load(data / "train.npz") as arrays:
        known = torch.from_numpy(arrays["x"]).float()[:, None].expand(-1, 3, -1, -1) / 255
    wanted = (known - mean) / std
    distance = (batch["images"][:, None] - wanted[None]).abs().amax((2, 3, 4))
    assert (distance.amin(1) < 1e-5).all()

    source = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    scaled = F.interpolate(batch["images"], (16, 16), mode="bilinear", antialias=True)
    features = source.vit(pixel_values=scaled).last_hidden_state[:, 0]
    logits = run.model.eval().classifier(features)
    expected = F.cross_entropy(logits, batch["labels"], reduction="sum")
    torch.testing.assert_close(run.loss(run.model, batch), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"stabilize": ["sigma_reparam"]},
        {"finetune.mixout": 0.5, "finetune.layer_decay": 0.5, "data.mixup_alpha": 0.2, "label_smoothing": 0.1},
    ],
)
def test_methods_work_on_it_and_are_folded_away(changes, data, vit, tmp_path):
    result = tame.train("vit", overrides=values(data, vit, tmp_path / "run", **changes))
    assert np.isfinite(result.metrics["eval/loss"])
    tame.export(tmp_path / "run", tmp_path / "out")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    pixels = torch.rand(2, 3, 16, 16)
    expected = model_of(tmp_path / "run", 4)(pixel_values=pixels).logits
    torch.testing.assert_close(again(pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused_with_the_remedy(data, vit, tmp_path):
    with pytest.raises(
        ConfigError, match=r"classifier\.bias has shape \(5,\) there and \(2,\) here.*--replace_head true"
    ):
        tame.train("vit", overrides=values(data, vit, tmp_path / "run", replace_head=False))
    pillow = pytest.importorskip("PIL.Image")
    for name in ("dark", "bright"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        pillow.new("RGB", (20, 20)).save(tmp_path / "photos" / "train" / name / "0.png")
    photos = {"data.source": "folder", "data.validation_fraction": 0.5}
    for more, message in (
        ({"data.image_size": 32}, "its images are 16 x 16, and those here 32 x 32; give --data.image_size 16"),
        ({"data.image_size": 16, "data.channels": 1}, "have 3 channels, and those here 1; give --data.channels 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            tame.train("vit", overrides=values(tmp_path / "photos", vit, tmp_path / "run", **photos, **more))
    changes = {"model.architecture": "resnet", "model.widths": [8, 16]}
    with pytest.raises(ConfigError, match=r"and model\.architecture resnet another; leave one of them out"):
        tame.train("vit", overrides=values(data, vit, tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match="replace_head is about the head of init_from"):
        resolve("vit", {"replace_head": True})
    assert not (tmp_path / "run").exists()
