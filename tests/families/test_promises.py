"""What every stabilizer promises, over every family of models whose layers we know; what only one promises is in its own file.

Each method stands here with settings at which its promise about the outputs can be tested: those that can start without a
change do, to the bit where the model's own code runs, to rounding where torch's fused path gives way to the plain one.
"""

import copy
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tameformer.errors import PatchError
from tameformer.optim import decay_groups
from tameformer.stabilizers import METHODS, stabilize
from zoo import FAMILIES, main_output, traces

POST = ["torch-encoder-post", "torch-decoder", "torch-transformer", "encoder-post"]
POST += [f"{name}-sdpa" for name in ("bert", "marian")]
PRE = ["torch-encoder-pre-causal", "encoder-pre", "decoder", "encoder-decoder", "vision"]
PRE += [f"{name}-sdpa" for name in ("vit", "gpt2", "llama", "t5")]
ALL = [*POST, *PRE, "encoder-peri", "encoder-none"]
MODES = ("train", "eval", "no_grad")
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@dataclass(frozen=True)
class Promise:
    """A method as it is tested here."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    fits: list[str] = field(default_factory=lambda: ALL)
    starts_unchanged: bool = True
    bakes: bool = True
    sets_weights: bool = False
    """Whether it writes starting values, so that removal gives back the parameters and not their first values."""
    modes: tuple[str, ...] = MODES


PROMISES = {
    "sigma_reparam": Promise("sigma_reparam"),
    "sigma_reparam, gamma 1": Promise("sigma_reparam", {"gamma": 1.0}, starts_unchanged=False),
    "admin, factors of 1": Promise("admin", {"growth": "linear"}, POST),
    "admin": Promise("admin", {}, POST, starts_unchanged=False),
    "admin, fixed": Promise("admin", {"trainable": False}, POST, starts_unchanged=False),
    "deepnorm": Promise(
        "deepnorm", {}, [name for name in POST if name != "torch-decoder"], starts_unchanged=False, sets_weights=True
    ),
    "layer_scale": Promise("layer_scale", {"init": 1.0}),
    "rezero": Promise("rezero", starts_unchanged=False),
    "depth_scaled_init": Promise("depth_scaled_init", starts_unchanged=False, sets_weights=True),
    "t_fixup": Promise("t_fixup", starts_unchanged=False, sets_weights=True),
    "peri_norm": Promise("peri_norm", {}, PRE, starts_unchanged=False, bakes=False),
    "qk_norm": Promise("qk_norm", starts_unchanged=False, bakes=False),
    "soft_cap": Promise("soft_cap", {"cap": 1e4}, bakes=False),
    "soft_cap, tight": Promise("soft_cap", {"cap": 0.1}, starts_unchanged=False, bakes=False),
    "qk_clip": Promise("qk_clip"),
    "z_loss": Promise(
        "z_loss", modes=("eval", "no_grad")
    ),  # it wants a loss in training: tests/stabilizers/test_z_loss.py
}
CASES = [
    pytest.param(promise, name, id=f"{label}-{name}") for label, promise in PROMISES.items() for name in promise.fits
]
over_every_case = pytest.mark.parametrize(("promise", "name"), CASES)


@pytest.fixture
def output():
    """From a model, its inputs and a mode to its main output, always with the same dropout."""

    def run(model, inputs, mode="eval"):
        model.train(mode == "train")
        torch.manual_seed(1)
        with torch.set_grad_enabled(mode != "no_grad"):
            return main_output(model(**inputs)).detach().clone()

    return run


def ties_of(model):
    """Names that share a parameter."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [sharing for sharing in names.values() if len(sharing) > 1]


def identities(model):
    return [(name, id(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)]


def moved(handle):
    """Let what a method added take other values than those it starts with, some of each other sign."""
    with torch.no_grad():
        for place, parameter in enumerate(handle.new_parameters):
            parameter.add_(torch.linspace(0.1, 0.4, parameter.numel()).view_as(parameter) * (1 + place % 3))


def test_every_method_is_here():
    assert {promise.method for promise in PROMISES.values()} == set(METHODS)


@over_every_case
def test_outputs_at_the_start_are_unchanged_or_the_method_says_otherwise(promise, name, output):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    before = {mode: output(model, inputs, mode) for mode in promise.modes}
    stabilize(model, promise.method, **promise.settings)
    for mode in promise.modes:
        after = output(model, inputs, mode)
        if promise.starts_unchanged:
            # Attention dropout draws elsewhere once attention is opened between its logits and its softmax.
            if mode != "train" or promise.method not in ("soft_cap", "qk_clip"):
                torch.testing.assert_close(after, before[mode], rtol=1e-4, atol=1e-5)
        else:
            assert (after - before[mode]).abs().max() > 1e-4
            assert after.isfinite().all()


@over_every_case
def test_what_it_adds_acts_in_every_mode_and_learns(promise, name, output):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    handle = stabilize(model, promise.method, **promise.settings)
    names = {id(parameter): label for label, parameter in model.named_parameters()}
    assert all(id(parameter) in names for parameter in handle.new_parameters)
    before = {mode: output(model, inputs, mode) for mode in promise.modes}
    moved(handle)
    for mode in promise.modes:
        assert (not handle.new_parameters) == torch.equal(output(model, inputs, mode), before[mode])
    model.train("train" in promise.modes)
    out = model(**inputs)
    (out if isinstance(out, torch.Tensor) else out.logits).float().square().sum().backward()
    assert [names[id(p)] for p in handle.new_parameters if p.grad is None or not p.grad.isfinite().all()] == []


@over_every_case
def test_removal_gives_back_the_same_parameters_and_leaves_nothing(promise, name, output):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = traces(model, optimizer), identities(model), list(model.state_dict()), ties_of(model)
    plain = output(model, inputs)
    handle = stabilize(model, promise.method, **promise.settings)
    output(model, inputs, promise.modes[0])
    moved(handle)
    handle.remove()
    assert (traces(model.train(), optimizer), identities(model), list(model.state_dict()), ties_of(model)) == before
    assert [type(module) for module in model.modules()] == [type(module) for module in reference.modules()]
    if not promise.sets_weights:
        kept = reference.state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        assert torch.equal(output(model, inputs), plain)


@over_every_case
def test_baking_keeps_the_outputs_in_an_unpatched_model_that_safetensors_saves(promise, name, output):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    keys, objects, ties = list(model.state_dict()), identities(model), ties_of(model)
    kinds = [type(module) for module in model.modules()]
    handle = stabilize(model, promise.method, **promise.settings)
    moved(handle)
    expected = output(model, inputs)
    if not promise.bakes:
        with pytest.raises(PatchError, match=f"{promise.method} cannot be folded into plain weights"):
            handle.bake()
        assert handle.is_active
        assert torch.equal(output(model, inputs), expected)
        return
    handle.bake()
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    if promise.method in ("rezero", "t_fixup"):  # whose models have no norms left
        assert set(model.state_dict()) <= set(keys)
    else:
        assert (list(model.state_dict()), identities(model), ties_of(model)) == (keys, objects, ties)
        assert [type(module) for module in model.modules()] == kinds
    tied = {key for sharing in ties for key in sharing[1:]}
    stored = {key: value.contiguous() for key, value in model.state_dict().items() if key not in tied}
    loaded = load(save(stored))
    assert all(torch.equal(loaded[key], value) for key, value in stored.items())


@over_every_case
def test_a_checkpoint_of_a_patched_model_fits_a_freshly_patched_one(promise, name, output):
    model, inputs = FAMILIES[name].model(seed=0), FAMILIES[name].inputs()
    handle = stabilize(model, promise.method, **promise.settings)
    moved(handle)
    fresh = FAMILIES[name].model(seed=5)
    stabilize(fresh, promise.method, **{**promise.settings, **handle.settings})
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, inputs), output(model, inputs))


@over_every_case
def test_new_parameters_reach_the_optimizer_in_one_group_each(promise, name):
    model = FAMILIES[name].model()
    handle = stabilize(model, promise.method, **promise.settings)
    grouped = [id(parameter) for group in decay_groups(model, weight_decay=0.1) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert len(set(grouped)) == len(grouped)
    assert {id(parameter) for parameter in handle.new_parameters} <= set(grouped)


@over_every_case
def test_ties_hold_while_it_is_on(promise, name):
    model = FAMILIES[name].model()
    groups = [[tuple(key.rpartition(".")[::2]) for key in sharing] for sharing in ties_of(model)]
    stabilize(model, promise.method, **promise.settings)
    for (first_owner, first), *others in groups:
        one = getattr(model.get_submodule(first_owner), first)
        for owner, attribute in others:
            assert torch.equal(getattr(model.get_submodule(owner), attribute), one)


@over_every_case
def test_nothing_is_left_after_an_exception_midway(promise, name, output, monkeypatch):
    def failing_after(steps):
        """Let a change fail right after so many of its steps, each of which ends with the way back being noted."""
        register, noted = ExitStack.callback, []

        def callback(stack, *args, **kwargs):
            found = register(stack, *args, **kwargs)
            noted.append(found)
            if len(noted) == steps:
                raise MemoryError(f"no memory after step {steps}")
            return found

        monkeypatch.setattr(ExitStack, "callback", callback)
        return noted

    noted = failing_after(None)
    stabilize(FAMILIES[name].model(), promise.method, **promise.settings)
    monkeypatch.undo()
    assert noted or promise.sets_weights
    for steps in sorted({1, (len(noted) + 1) // 2, len(noted)} & {*range(1, len(noted) + 1)}):
        model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, plain = (traces(model, optimizer), identities(model), [*model.state_dict()]), output(model, inputs)
        failing_after(steps)
        with pytest.raises(MemoryError, match=f"after step {steps}"):
            stabilize(model, promise.method, **promise.settings)
        monkeypatch.undo()
        assert (traces(model.train(), optimizer), identities(model), [*model.state_dict()]) == before
        if not promise.sets_weights:
            assert torch.equal(output(model, inputs), plain)


@pytest.mark.parametrize("promise", PROMISES.values(), ids=PROMISES)
def test_where_it_does_not_fit_it_says_why_and_changes_nothing(promise, output):
    for name in [name for name in ALL if name not in promise.fits]:
        model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before, plain = (traces(model, optimizer), identities(model)), output(model, inputs)
        with pytest.raises(PatchError, match=rf"{promise.method} (needs|knows) .*(found|but) .*"):
            stabilize(model, promise.method, **promise.settings)
        assert (traces(model.train(), optimizer), identities(model)) == before
        assert torch.equal(output(model, inputs), plain)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "z_loss"])
def test_a_model_where_nothing_matches_is_told_what_was_looked_for(method):
    model = nn.Sequential(nn.ReLU(), nn.Dropout())
    with pytest.raises(PatchError, match=r"looked for .*found"):
        stabilize(model, method)
    assert not list(model.state_dict())
