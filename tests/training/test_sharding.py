"""Weights shared out over two processes train as whole ones do, in every recipe, and go on to the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tameformer import train
from tameformer.errors import ConfigError
from tameformer.record import RunReader
from tameformer.training.sharding import is_shared_out, share_out, whole
from tiny_recipes import SETTINGS, values_of, write_data
from two_processes import in_two

SHORT = {"max_steps": 3, "loop.logging_steps": 1, "optim.warmup_steps": 1, "precision": "fp32"}
DEEP = {"model.dim": 16, "model.num_layers": 2}
CHECKED = ("train/loss", "train/grad_norm", "eval/loss")


def in_two_processes(folder, runs):
    script = Path(__file__).with_name("shared_out.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    answer = subprocess.run(
        [*map(str, command), str(folder), json.dumps(runs)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-5000:]


def assert_alike(folder, name, *, rel=1e-3):
    whole_weights, shared = (RunReader(folder / f"{name}-{kind}").log() for kind in ("ddp", "fsdp"))
    assert [line["step"] for line in shared] == [line["step"] for line in whole_weights]
    seen = set()
    for ours, theirs in zip(shared, whole_weights, strict=True):
        for key in CHECKED:
            if key in theirs:
                seen.add(key)
                assert ours[key] == pytest.approx(theirs[key], rel=rel), (name, ours["step"], key)
    assert seen.issuperset({"train/loss", "train/grad_norm"}), name


def both(cases):
    return {
        f"{name}-{kind}": [recipe, {**SHORT, **settings, "fsdp": kind == "fsdp"}]
        for name, (recipe, settings) in cases.items()
        for kind in ("ddp", "fsdp")
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "recipes",
    [
        (
            "char-lm",
            "contrastive",
            "hierarchical",
            "masked-lm",
            "speech",
            "translation",
        ),
        pytest.param(
            (
                "formal",
                "graph",
                "lm",
                "masked-image",
                "seq2seq-rnn",
                "set",
                "text-classification",
                "video",
                "vit",
                "vit-digits",
                "vit-digits-augmented",
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "the_rest"],
)
def test_recipes_train_as_with_whole_weights(tmp_path, recipes):
    write_data(tmp_path)
    # An evaluation before the first step, of which the processes have different shares: none may wait for the other.
    settings = {"loop.eval_on_start": True}
    cases = {name: (name, {**values_of(name, tmp_path), **settings}) for name in recipes}
    adaptive = {"model.architecture": "universal", "model.halting": "adaptive"}
    cases["halting"] = ("formal", {**values_of("formal", tmp_path), **adaptive})
    in_two_processes(tmp_path, both(cases))
    for name in cases:
        assert_alike(tmp_path, name)
    kept = [event["message"] for event in RunReader(tmp_path / "halting-fsdp").events() if event["kind"] == "fsdp"]
    assert len(kept) == 1
    assert "this process keeps" in kept[0]
    (unseen,) = (event for event in RunReader(tmp_path / "halting-fsdp").events() if event["kind"] == "unseen")
    assert "halting.weight: a DTensor, of which this process may hold a part only" in "".join(unseen["unseen"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("optimizers", "methods"),
    [
        (("muon",), ("sigma_reparam", "qk_clip")),
        pytest.param(
            ("sgd", "adam", "radam", "stable_adamw", "lars"),
            ("layer_scale", "peri_norm", "qk_norm", "rezero", "soft_cap"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "the_rest"],
)
def test_optimizers_and_methods_do_as_with_whole_weights(tmp_path, optimizers, methods):
    cases = {name: ("vit-digits", {**DEEP, "optim.name": name}) for name in optimizers}
    cases |= {name: ("vit-digits", {**DEEP, "stabilize": [name]}) for name in methods}
    cases["parts"] = ("vit-digits", {**DEEP, "gradient_accumulation_steps": 2, "optim.clipping": "adaptive"})
    in_two_processes(tmp_path, both(cases))
    for name in cases:
        assert_alike(tmp_path, name)


@pytest.mark.timeout(400)
def test_profiles_and_fine_tuning_come_before_the_weights_are_shared_out(tmp_path):
    write_data(tmp_path)
    text = values_of("text-classification", tmp_path)
    held = {"finetune.prior_decay": 0.1, "finetune.mixout": 0.5, "finetune.layer_decay": 0.5}
    cases = {
        "admin": ("vit-digits", {**DEEP, "model.residual": "post", "stabilize": ["admin"]}),
        "held": ("text-classification", {**text, **held}),
        "frozen": ("text-classification", {**text, "finetune.freeze_layers": 1}),
    }
    in_two_processes(tmp_path, both(cases))
    for name in cases:
        assert_alike(tmp_path, name)


def last_checkpoint(folder):
    path = folder / "checkpoints" / (folder / "LATEST").read_text().strip()
    return {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "average")}


@pytest.mark.timeout(400)
def test_a_run_goes_on_to_the_same_bits_and_on_one_process_too(tmp_path):
    settings = {**SHORT, **DEEP, "fsdp": True, "max_steps": 6, "loop.eval_steps": 3, "optim.ema_decay": 0.5}
    settings |= {"data.augment": ["shift"], "data.num_workers": 2}
    paused = ["vit-digits", {**settings, "loop.pause_after": 0.5}]
    in_two_processes(tmp_path, {"never": ["vit-digits", settings], "paused": paused, "moved": paused})
    in_two_processes(tmp_path, {"paused": ["vit-digits", settings]})
    reference, resumed = last_checkpoint(tmp_path / "never"), last_checkpoint(tmp_path / "paused")
    for file, tensors in reference.items():
        assert tensors.keys() == resumed[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, resumed[file][name]), (file, name)
    train("vit-digits", overrides={**settings, "output_dir": str(tmp_path / "moved")}, resume="auto")
    alone, together = (RunReader(tmp_path / name).log()[-1] for name in ("moved", "never"))
    assert alone["eval/loss"] == pytest.approx(together["eval/loss"], rel=1e-3)
    told = [event["message"] for event in RunReader(tmp_path / "moved").events() if event["kind"] == "fsdp"]
    assert "one process, which keeps all weights" in told[-1]


class Tied(nn.Module):
    """Two layers in a list, and an output that shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def other_numbers_of_passes(rank):
    model, reference = Tied(), Tied()
    share_out(model, device=torch.device("cpu"))
    assert is_shared_out(model)
    assert not is_shared_out(reference)
    assert model.layers[0][0].weight.to_local().shape == (2, 4)
    tokens = torch.arange(5)
    with whole(model), torch.no_grad():
        for _ in range(1 + 2 * rank):  # one process runs once, the other three times
            assert torch.equal(model(tokens), reference(tokens))
        assert torch.equal(model.layers[0](torch.ones(4)), reference.layers[0](torch.ones(4)))  # a part of it alone
    assert model.layers[0][0].weight.to_local().shape == (2, 4)
    model(tokens).square().sum().backward()
    reference(tokens).square().sum().backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    return True


def an_error_leaves_it_shared_out(rank):
    model = Tied()
    share_out(model, device=torch.device("cpu"))
    with pytest.raises(KeyError), whole(model):
        raise KeyError("evaluation")
    assert model.layers[0][0].weight.to_local().shape == (2, 4)
    model(torch.arange(5)).sum().backward()
    return True


def numbers_are_refused(rank):
    model = nn.Sequential(nn.Linear(2, 2))
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match="scale is a single number"):
        share_out(model, device=torch.device("cpu"))
    return True


def test_inside_whole_nobody_waits_for_the_others(tmp_path):
    works = (other_numbers_of_passes, an_error_leaves_it_shared_out, numbers_are_refused)
    assert in_two(works, tmp_path) == [[True] * 3] * 2


def test_every_recipe_is_among_them():
    (marks,) = (mark for mark in test_recipes_train_as_with_whole_weights.pytestmark if mark.name == "parametrize")
    some, rest = marks.args[1]
    assert {*some, *rest.values[0]} == set(SETTINGS)
