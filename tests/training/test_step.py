"""A refused step changes nothing: weights, moments, and the count behind Adam's bias correction."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tameformer.optim import LARS, NormClip, StableAdamW
from tameformer.training.engine import Engine
from tameformer.training.step import can_refuse_on_device, told_to_refuse, train_step

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1),
    "lars": lambda p: LARS(p, lr=0.1),
    "stable_adamw": lambda p: StableAdamW(p, lr=0.1),
}


def parts(name):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, OPTIMIZERS[name](model.parameters())


def batch(seed=0, factor=1.0):
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(8, 4, generator=draw) * factor, "num_items": 8}


def step(model, optimizer, given, **limits):
    return train_step(Engine(), model, [optimizer], [given], loss_of, clip=NormClip([optimizer], 1.0), **limits)


def loss_of(model, batch):
    return model(batch["x"]).square().sum()


def everything(model, optimizer):
    state = {f"{i}/{key}": value for i, part in optimizer.state_dict()["state"].items() for key, value in part.items()}
    return copy.deepcopy({**model.state_dict(), **state})


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("before", [0, 3])
def test_a_refused_step_leaves_no_trace(name, bad, before):
    """With steps before and after it, or as the very first: the bits are those of a run that never met the bad batch."""
    (model, optimizer), (clean, clean_optimizer) = parts(name), parts(name)
    for seed in range(before):
        assert bool(step(model, optimizer, batch(seed)).taken)
        step(clean, clean_optimizer, batch(seed))
    refused = step(model, optimizer, batch(factor=bad))
    assert not bool(refused.taken)
    assert equal(everything(model, optimizer), everything(clean, clean_optimizer))
    for seed in range(5, 8):
        step(model, optimizer, batch(seed))
        step(clean, clean_optimizer, batch(seed))
    assert equal(everything(model, optimizer), everything(clean, clean_optimizer))


def test_limits_refuse_what_is_finite_but_beyond_them():
    model, optimizer = parts("adamw")
    kept = everything(model, optimizer)
    loss = float(step(model, optimizer, batch(), limits=lambda: (0.0, math.inf)).loss_sum) / 8
    norm = float(step(model, optimizer, batch(), limits=lambda: (math.inf, 0.0)).grad_norm)
    assert equal(everything(model, optimizer), kept)
    assert bool(step(model, optimizer, batch(), limits=lambda: (loss * 1.001, norm * 1.001)).taken)
    assert not equal(everything(model, optimizer), kept)


def test_the_broken_gradient_is_named():
    model, optimizer = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), None
    optimizer = torch.optim.AdamW(model.parameters())
    model[1].weight.register_hook(lambda gradient: gradient * math.inf)
    assert [id(p) for p in step(model, optimizer, batch()).suspects] == [id(model[1].weight)]


@pytest.fixture
def nobody_listens(monkeypatch):
    """To optimizers in general: models of other tests may still be there, and their weights followed."""
    monkeypatch.setattr("tameformer.training.step._global_optimizer_pre_hooks", {})
    monkeypatch.setattr("tameformer.training.step._global_optimizer_post_hooks", {})


@pytest.mark.usefixtures("nobody_listens")
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_fused_optimizers_refuse_by_a_tensor_as_by_an_if(name):
    """What accelerators do, on the processor's fused kernels: no host ever reads the flag."""
    (model, optimizer), (clean, clean_optimizer) = parts(name), parts(name)
    assert not can_refuse_on_device([optimizer])  # in the first step SGD would keep a buffer that nobody filled
    for seed in range(3):
        step(model, optimizer, batch(seed))
        step(clean, clean_optimizer, batch(seed))
    assert can_refuse_on_device([optimizer])
    for refused in (1.0, 0.0):
        model(batch(9)["x"] * (math.nan if refused else 1.0)).square().sum().backward()
        with told_to_refuse([optimizer], torch.tensor(refused)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if refused:
            assert equal(everything(model, optimizer), everything(clean, clean_optimizer))
    clean(batch(9)["x"]).square().sum().backward()
    clean_optimizer.step()
    assert equal(everything(model, optimizer), everything(clean, clean_optimizer))
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.usefixtures("nobody_listens")
def test_optimizers_that_cannot_refuse_by_themselves_are_asked_on_the_host():
    for name in ("radam", "lars", "stable_adamw"):
        model, optimizer = parts(name)
        step(model, optimizer, batch())
        assert not can_refuse_on_device([optimizer])
    model, optimizer = parts("adamw")
    step(model, optimizer, batch())
    handle = optimizer.register_step_post_hook(lambda *_: None)  # would be told of a step that was not taken
    assert not can_refuse_on_device([optimizer])
    handle.remove()
    assert can_refuse_on_device([optimizer])


def test_who_listens_to_all_optimizers_has_the_host_decide():
    model, optimizer = parts("adamw")
    step(model, optimizer, batch())
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert not can_refuse_on_device([optimizer])
    finally:
        handle.remove()
