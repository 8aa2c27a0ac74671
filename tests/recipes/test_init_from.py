"""A model starts from what another run learned, to the bit, or the run is refused with every reason."""

import shutil
from dataclasses import fields

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.errors import ConfigError, DataError
from tameformer.recipes import catalogue
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.exported import load
from tameformer.recipes.init_from import take_weights
from tameformer.recipes.vision import VisionDataConfig, sources
from tameformer.training.checkpoint import load as load_checkpoint

SMALL = {
    "model.dim": 16, "model.num_heads": 2, "model.num_layers": 1, "model.pooling": "class_token", "max_steps": 3,
    "precision": "fp32", "optim.warmup_steps": 1, **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
}  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    tame.train("vit-digits", overrides={**SMALL, "stabilize": ["sigma_reparam"], "output_dir": str(folder)})
    return folder


def fresh(folder, **changes):
    recipe = catalogue.resolve("vit-digits", {**SMALL, **changes})
    return recipe.build(recipe.config, folder).model


def test_all_weights_but_the_head_are_those_of_the_run_and_its_methods_are_folded(pretrained, tmp_path):
    tame.export(pretrained, tmp_path / "exported")
    given = load(tmp_path / "exported").state_dict()
    untouched = fresh(tmp_path / "none").state_dict()
    for source in (pretrained, tmp_path / "exported", pretrained / "checkpoints" / "step-000003"):
        found = fresh(tmp_path / "none", init_from=str(source)).state_dict()
        for name, tensor in found.items():
            expected = untouched if name.startswith(("head.", "pooling.")) else given
            assert torch.equal(tensor, expected[name]), name
    assert not torch.equal(given["head.weight"], untouched["head.weight"])


def test_methods_of_the_new_run_come_on_top(pretrained, tmp_path):
    model = fresh(tmp_path, init_from=str(pretrained), stabilize=["sigma_reparam"])
    plain = fresh(tmp_path, init_from=str(pretrained))
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(model.eval()(images), plain.eval()(images))


def test_a_resumed_run_needs_the_first_no_more(pretrained, tmp_path):
    moved = tmp_path / "first"
    shutil.copytree(pretrained, moved)
    values = {**SMALL, "init_from": str(moved), "max_steps": 4, "checkpoint.every": 2, "seed": 1}
    whole = tame.train("vit-digits", overrides={**values, "output_dir": str(tmp_path / "whole")})
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    shutil.rmtree(moved)
    assert tame.train("vit-digits", overrides={**values, "output_dir": str(cut)}, resume="auto").step == whole.step
    first, second = (load_checkpoint(one / "checkpoints/step-000004").model for one in (cut, tmp_path / "whole"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    with pytest.raises(ConfigError, match=r"init_from was .* and is other"):
        tame.train("vit-digits", overrides={**values, "init_from": "other", "output_dir": str(cut)}, resume="auto")


FINETUNE = {"finetune.layer_decay": 0.5, "finetune.mixout": 0.5, "finetune.prior_decay": 0.1}


def test_the_keys_of_finetune_are_those_of_texts(pretrained, tmp_path):
    values = {**SMALL, **FINETUNE, "init_from": str(pretrained), "max_steps": 4, "checkpoint.every": 2}
    tame.train("vit-digits", overrides={**values, "output_dir": str(tmp_path / "whole")})
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    tame.train("vit-digits", overrides={**values, "output_dir": str(cut)}, resume="auto")
    first, second = (load_checkpoint(one / "checkpoints/step-000004").model for one in (cut, tmp_path / "whole"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    tame.export(pretrained, tmp_path / "given")
    tame.export(tmp_path / "whole", tmp_path / "out", weights="raw")
    given, out = load(tmp_path / "given").state_dict(), load(tmp_path / "out").state_dict()
    name = "stack.layers.0.feed_forward.branch.up"
    assert torch.equal(second[f"{name}.parametrizations.weight.0.target"], given[f"{name}.weight"])
    assert torch.equal(second[f"{name}.bias_prior"], given[f"{name}.bias"])
    assert given.keys() == out.keys()
    assert not torch.equal(given[f"{name}.weight"], out[f"{name}.weight"])
    recipe = catalogue.resolve("vit-digits", values)
    groups = recipe.build(recipe.config, tmp_path / "none").optimizers[0].param_groups
    assert len({group["lr"] for group in groups}) == 3  # head, layer, stem


def test_what_does_not_fit_is_refused_and_named(pretrained, tmp_path):
    with pytest.raises(ConfigError, match=r"num_heads is 2 there and 4 here.*give --model.num_heads 2"):
        fresh(tmp_path, init_from=str(pretrained), **{"model.num_heads": 4})
    with pytest.raises(DataError, match=r"nowhere is neither a folder nor a name on the hub"):
        fresh(tmp_path, init_from=str(tmp_path / "nowhere"))
    kept = tmp_path / "kept"
    tame.train("vit-digits", overrides={**SMALL, "max_steps": 1, "stabilize": ["qk_norm"], "output_dir": str(kept)})
    with pytest.raises(ConfigError, match="keeps qk_norm, which cannot be folded"):
        fresh(tmp_path, init_from=str(kept))


def test_every_weight_that_does_not_fit_is_named(pretrained, tmp_path):
    images = np.zeros((20, 8, 8, 3), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=images, y=np.arange(20) % 2)
    data = {"data.source": "npz", "data.path": str(tmp_path), "data.batch_size": 4}
    with pytest.raises(
        ConfigError, match=r"stem\.stages\.0\.weight has shape \(16, 1, 3, 3\) there and \(16, 3, 3, 3\) here"
    ):
        fresh(tmp_path / "none", init_from=str(pretrained), **data)


def test_many_that_do_not_fit_are_all_named(pretrained, tmp_path):
    recipe = catalogue.resolve("vit-digits", SMALL)
    model = fresh(tmp_path / "none")
    layer = model.stack.layers[0].feed_forward.branch
    layer.up, model.added = torch.nn.Linear(16, 24), torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError) as caught:
        take_weights(model, recipe.config.model, str(pretrained), fresh=("head.",))
    for part in (
        "up.weight has shape (64, 16) there and (24, 16) here", "up.bias has shape (64,) there and (24,) here",
        "added.weight is missing there", "added.bias is missing there",
    ):  # fmt: skip
        assert part in str(caught.value)


def test_a_few_training_images_are_chosen_by_class_and_seed():
    data = VisionDataConfig(train_samples=100)
    first, held_out = sources(data, 0)
    again, other = sources(data, 0)[0], sources(data, 1)[0]
    assert len(first) == 100
    assert len(held_out) == 360
    assert np.bincount(first.labels).min() >= 9
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)
    assert first.mean == sources(VisionDataConfig(), 0)[0].mean
    with pytest.raises(ConfigError, match=r"data\.train_samples is 2000, but there are 1437 training images"):
        sources(VisionDataConfig(train_samples=2000), 0)
