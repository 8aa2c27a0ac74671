import inspect
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.errors import ConfigError, PatchError
from tameformer.stabilizers import METHODS, stabilize


def test_every_method_is_public_by_its_own_name():
    for name, method in METHODS.items():
        assert getattr(tame, name) is method.apply
        assert method.apply.__name__ == name
        assert inspect.getdoc(method.apply)
        assert all((method.paper, method.use_when, method.cost))


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(PatchError, match=r"there is no method sigma_reparm; did you mean sigma_reparam\?"):
        stabilize(nn.Linear(2, 2), "sigma_reparm")


def test_the_command_lists_all(capsys):
    assert main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)


@pytest.mark.parametrize("name", ["sigma_reparam", "layer_scale"])
def test_a_recipe_with_a_method_resumes_to_the_same_bits(name, tmp_path):
    settings = {"stabilize": [name], "model.dim": 16, "max_steps": 6, "checkpoint.every": 3, "precision": "fp32"}
    whole = tame.train("vit-digits", overrides={**settings, "output_dir": str(tmp_path / "whole")})
    tame.train("vit-digits", overrides={**settings, "output_dir": str(tmp_path / "parts")})
    shutil.rmtree(tmp_path / "parts/checkpoints/step-000006")  # as if it had been killed before
    resumed = tame.train("vit-digits", overrides={**settings, "output_dir": str(tmp_path / "parts")}, resume="auto")
    assert {k: v for k, v in resumed.metrics.items() if not k.startswith("perf/")} == {
        k: v for k, v in whole.metrics.items() if not k.startswith("perf/")
    }
    files = [load_file(tmp_path / run / "checkpoints/step-000006/model.safetensors") for run in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert any("parametrizations" in key for key in files[0])


def test_a_recipe_refuses_an_unknown_method():
    with pytest.raises(ConfigError, match="there is no method sigma; did you mean"):
        tame.train("vit-digits", overrides={"stabilize": ["sigma"]})
