"""The recipes' key `stabilize`: names and settings, refused early, and profiles on the run's own data."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.errors import ConfigError
from tameformer.models import EncoderDecoderConfig, encoder_decoder
from tameformer.patch.adapters import branches
from tameformer.recipes import catalogue
from tameformer.recipes.stabilize import apply_methods, methods_of
from tameformer.stabilizers import METHODS, admin
from tameformer.stabilizers.shortcut_profile import profile

TINY = {"model.dim": 16, "model.num_layers": 2, "max_steps": 6, "checkpoint.every": 3, "precision": "fp32"}
ADMIN = {**TINY, "model.residual": "post", "stabilize": ["admin"]}


@pytest.fixture
def pairs(tmp_path):
    words = ("ein", "mann", "geht", "hund", "rot", "blau")
    for split, count in (("train", 60), ("val", 6)):
        lines = [" ".join(words[(index + i) % 6] for i in range(1 + index % 7)) for index in range(count)]
        (tmp_path / f"{split}.en").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{split}.de").write_text("\n".join(line.upper() for line in reversed(lines)) + "\n")
    return {
        "data.path": str(tmp_path / "train"), "data.validation_path": str(tmp_path / "val"), "data.vocab_size": 300,
        "data.max_tokens": 400, "model.dim": 16, "model.num_heads": 2, "model.num_encoder_layers": 2,
        "model.num_decoder_layers": 2, "model.residual": "post", "max_steps": 4, "precision": "fp32",
        "optim.warmup_steps": 1,
    }  # fmt: skip


def final(folder, step):
    return load_file(Path(folder) / f"checkpoints/step-{step:06d}/model.safetensors")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[sigma_reparm]", "there is no method sigma_reparm; did you mean sigma_reparam?"),
        ("[{sigma_reparam: {gama: 1.0}}]", "sigma_reparam has no setting gama; did you mean gamma?"),
        ("[{sigma_reparam: {gamma: much}}]", "gamma of sigma_reparam expects float or null, got 'much'"),
        ("[{sigma_reparam: {remove_norms: 1}}]", "remove_norms of sigma_reparam expects bool, got 1"),
        ("[{deepnorm: {start: zero}}]", "start of deepnorm expects one of scale, xavier, keep, got 'zero'"),
        ("[{admin: {scales: [1, two]}}]", "scales of admin expects a list of float or null, got [1, 'two']"),
        ("[{sigma_reparam: {where: all}}]", "where of sigma_reparam takes Python objects"),
        ("[{sigma_reparam: 3}]", "expected settings of sigma_reparam by name, such as {sigma_reparam: {gamma: ...}}"),
        ("[{peri_norm: {a: 1}}]", "peri_norm has no setting a; it has none"),
        ("[{admin: {}, z_loss: {}}]", "expected one method an item, got admin, z_loss"),
        ("[{z_loss: {coefficient: -1}}]", "stabilize: expected a coefficient of at least 0, got -1"),
        ("[{admin: {scales: [1, 2]}}]", "expected 4 factors above 0, one a branch, got [1, 2]"),
        ("sigma_reparam", "stabilize expects a list of str or dict, got sigma_reparam"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(value, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shape = ["--model.num_layers=2", "--model.residual=post"]
    assert main(["train", "--stabilize", value, *shape, "--max_steps=1"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_and_settings_survive_the_command_line_yaml_and_print_config(tmp_path, capsys):
    given = "[z_loss, {sigma_reparam: {gamma: 1e-1, remove_norms: false}}, {admin: {scales: [1, 2.5, 3, 4]}}]"
    expected = (
        "z_loss",
        {"sigma_reparam": {"gamma": 0.1, "remove_norms": False}},
        {"admin": {"scales": [1, 2.5, 3, 4]}},
    )
    recipe = catalogue.parse("vit-digits", ["--stabilize", given])
    assert recipe.config.stabilize == expected
    assert recipe.config.methods[0] == ("z_loss", {})
    assert recipe.config.methods[1] == ("sigma_reparam", {"gamma": 0.1, "remove_norms": False})
    assert main(["train", "vit-digits", "--print_config", "--stabilize", given]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["stabilize"][1] == {"sigma_reparam": {"gamma": 0.1, "remove_norms": False}}
    (tmp_path / "again.yaml").write_text(printed)
    assert catalogue.resolve(str(tmp_path / "again.yaml")).config == recipe.config
    changed = catalogue.resolve(str(tmp_path / "again.yaml"), {"seed": 5}).config
    assert changed.stabilize == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_settings_that_a_recipe_can_hold_with_the_methods_own_defaults(name):
    assert methods_of([name, {name: {}}]) == [(name, {}), (name, {})]


def test_settings_reach_the_method_and_a_resume_with_others_is_refused(tmp_path):
    with_gamma = {**TINY, "stabilize": [{"sigma_reparam": {"gamma": 3.0}}], "optim.peak_lr": 1e-9}
    tame.train("vit-digits", overrides={**with_gamma, "output_dir": str(tmp_path)})
    gammas = [value for key, value in final(tmp_path, 6).items() if key.endswith("gamma")]
    assert gammas
    assert all(torch.allclose(gamma, torch.tensor(3.0)) for gamma in gammas)
    other = {**with_gamma, "stabilize": [{"sigma_reparam": {"gamma": 2.0}}], "output_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"stabilize was \[\{'sigma_reparam': \{'gamma': 3.0\}\}\] and is"):
        tame.train("vit-digits", overrides=other, resume="auto")
    again = tame.train("vit-digits", overrides={**with_gamma, "output_dir": str(tmp_path)}, resume="auto")
    assert again.step == 6


@pytest.mark.parametrize("trainable", [True, False])
def test_admin_profiles_the_first_batch_and_resumes_to_the_same_bits(trainable, tmp_path):
    settings = {**ADMIN, "stabilize": [{"admin": {"trainable": trainable}}]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = tame.train("vit-digits", overrides={**settings, "output_dir": str(whole)})
    tame.train("vit-digits", overrides={**settings, "output_dir": str(parts)})
    found = json.loads((parts / "profile.json").read_text())
    shutil.rmtree(parts / "checkpoints/step-000006")
    resumed = tame.train("vit-digits", overrides={**settings, "output_dir": str(parts)}, resume="auto")
    assert resumed.metrics["eval/loss"] == straight.metrics["eval/loss"]
    first, second = final(whole, 6), final(parts, 6)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((parts / "profile.json").read_text()) == found

    run = catalogue.resolve("vit-digits", {**settings, "stabilize": []})
    built = run.build(run.config, tmp_path / "nowhere")
    batch = next(iter(built.batches(start=0, stop=1, rank=0, world_size=1)))
    scales = profile(built.model, branches(built.model), batch, call=built.loss)
    assert found["admin"]["scales"] == list(scales.values())
    assert found["admin"]["trainable"] is trainable
    assert len({round(scale, 3) for scale in scales.values()}) > 2  # measured, not from the depth


def test_what_a_profile_gave_is_not_measured_again():
    def never():
        raise AssertionError("asked for batches")

    torch.manual_seed(0)
    config = EncoderDecoderConfig(dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, residual="post")
    gave = {"admin": {"trainable": True, "train_first": False, "scales": [1.0, 2.0, 1.0, 3.0, 4.0]}}
    for methods, known in (([("admin", {})], gave), ([("admin", {"growth": "constant"})], {})):
        model = encoder_decoder(config, vocab_size=20, padding_id=0)
        handles, _, kept = apply_methods(
            model, methods, lambda model, batch: model, batches=never, mask=lambda batch: {}, profiled=known
        )
        assert kept == known
        assert handles[0].settings["scales"][1] == (2.0 if known else 2**0.5)


def test_a_profile_leaves_the_padding_of_both_sides_out(pairs, tmp_path):
    run = catalogue.resolve("translation", {**pairs, "stabilize": []})
    built = run.build(run.config, tmp_path / "nowhere")
    (batch,) = next(iter(built.batches(start=0, stop=1, rank=0, world_size=1)))
    assert bool((~batch["source_mask"]).any())
    assert bool((batch["targets"] < 0).any())

    profiled = catalogue.resolve("translation", {**pairs, "stabilize": ["admin"]})
    artifacts = profiled.build(profiled.config, tmp_path / "nowhere").artifacts
    scales = json.loads(artifacts["profile.json"])["admin"]["scales"]

    # One pair at a time, each cut to its length, has no padding at all.
    def alone():
        for row in range(len(batch["source"])):
            source, target = batch["source_mask"][row].sum(), (batch["targets"][row] >= 0).sum()
            one = {key: value[row : row + 1] for key, value in batch.items() if key != "num_items"}
            yield {
                "source": one["source"][:, :source],
                "target_in": one["target_in"][:, :target],
            }

    handle = admin(built.model, list(alone()), mask=lambda batch: {})
    # Pass by pass the recursion's running factor differs a little from that over all rows at once.
    assert scales == pytest.approx(handle.settings["scales"], rel=0.02)
    unmasked = catalogue.resolve("translation", {**pairs, "stabilize": []})
    model = unmasked.build(unmasked.config, tmp_path / "nowhere").model
    careless = admin(model, [batch], call=built.loss, mask=lambda batch: {}).settings["scales"]
    assert careless != pytest.approx(scales, rel=0.02)


@pytest.mark.parametrize("method", ["admin", "deepnorm"])
def test_translation_trains_with_methods_for_post_norm(method, pairs, tmp_path):
    result = tame.train("translation", overrides={**pairs, "stabilize": [method], "output_dir": str(tmp_path / "run")})
    assert result.finished
    assert (tmp_path / "run/profile.json").exists() == (method == "admin")
