import copy

import pytest
import torch
from torch import nn

from tameformer.errors import PatchError
from tameformer.finetune import places, prior_decay
from tameformer.optim import OptimConfig, optimizers


def everything(name, parameter, place):
    return True


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def moved_away(model):
    with torch.no_grad():
        for one in model.parameters():
            one.add_(torch.randn_like(one))
            one.grad = torch.zeros_like(one)


def distances(model):
    owners = [(name, *name.rpartition(".")[::2]) for name, _ in model.named_parameters()]
    return torch.cat([
        (one := model.get_submodule(path), getattr(one, own) - getattr(one, f"{own}_prior"))[1].detach().flatten()
        for _, path, own in owners
    ])  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "stable_adamw", "sgd", "lars", "muon"])
def test_without_gradients_the_distance_falls_by_the_rate_alone(name):
    """Decoupled: (1 - lr * decay) a step whatever the optimizer is, at the rate of that step; its fixed point is the prior."""
    model = small()
    built = optimizers(model, OptimConfig(name=name, peak_lr=0.1, weight_decay=0.0), is_hidden=lambda name: True)
    prior_decay(model, built, decay=2.0, where=everything)
    moved_away(model)
    before, factor = distances(model), 1.0
    for step in range(6):
        for optimizer in built:
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (step + 1) / 6
            optimizer.step()
        factor *= 1 - 2.0 * 0.1 * (step + 1) / 6
    torch.testing.assert_close(distances(model), before * factor, rtol=1e-5, atol=1e-6)
    for _ in range(200):
        for optimizer in built:
            optimizer.step()
    assert distances(model).abs().max() < 1e-6


def test_equals_decay_by_hand_before_adamw():
    model, by_hand = small(), small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    reference = torch.optim.AdamW(by_hand.parameters(), lr=0.05, weight_decay=0.0)
    start = [one.detach().clone() for one in by_hand.parameters()]
    prior_decay(model, optimizer, decay=3.0, where=everything)
    x = torch.randn(8, 4)
    for _ in range(5):
        for one, stepping in ((model, optimizer), (by_hand, reference)):
            stepping.zero_grad()
            one(x).square().sum().backward()
        with torch.no_grad():
            for weight, prior in zip(by_hand.parameters(), start, strict=True):
                weight.sub_(0.05 * 3.0 * (weight - prior))
        optimizer.step()
        reference.step()
    for found, expected in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_refuses_does_not_decay(fused):
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0, fused=fused)
    prior_decay(model, optimizer, decay=1.0, where=everything)
    scaler = torch.amp.GradScaler("cpu")
    moved_away(model)
    scaler.scale(model(torch.ones(1, 4)).sum()).backward()
    model[0].weight.grad[0, 0] = float("inf")
    before = distances(model)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(distances(model), before)
    moved_away(model)
    before = distances(model)
    scaler.scale((0.0 * model(torch.ones(1, 4))).sum()).backward()
    scaler.step(optimizer)
    torch.testing.assert_close(distances(model), 0.9 * before, rtol=1e-5, atol=1e-6)


def test_a_tensor_as_the_rate():
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.1))
    prior_decay(model, optimizer, decay=1.0, where=everything)
    moved_away(model)
    before = distances(model)
    optimizer.step()
    torch.testing.assert_close(distances(model), 0.9 * before, rtol=1e-5, atol=1e-6)


def test_the_prior_is_saved_moved_and_not_trained():
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prior_decay(model, optimizer, decay=1.0, where=everything)
    moved_away(model)
    state = copy.deepcopy(model.state_dict())
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    stepping = torch.optim.SGD(other.parameters(), lr=0.1)
    prior_decay(other, stepping, decay=1.0, where=everything)
    other.load_state_dict(state)
    for one in other.parameters():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    stepping.step()
    assert all(torch.equal(one, twin) for one, twin in zip(model.parameters(), other.parameters(), strict=True))
    assert other.double()[0].weight_prior.dtype == torch.float64


def test_a_pretrained_model_is_held_and_its_head_is_free(build):
    model = build("bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names, values = list(model.state_dict()), copy.deepcopy(model.state_dict())
    with prior_decay(model, optimizer) as handle:
        assert set(handle.names) == {name for name, place in places(model).items() if place.above}
        assert not any(name.startswith(("classifier", "bert.pooler")) for name in handle.names)
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks


def test_what_does_not_fit_is_refused_and_leaves_nothing():
    model = small()
    partial = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(PatchError, match=r"2\.weight is in none of the optimizers"):
        prior_decay(model, partial, where=everything)
    assert not any(name.endswith("_prior") for name in model.state_dict())
    with pytest.raises(PatchError, match="Sequential has nothing to hold"):
        prior_decay(model, partial)
    with pytest.raises(ValueError, match="expected a finite decay of at least 0, got -1"):
        prior_decay(model, partial, decay=-1.0)
    full = torch.optim.SGD(model.parameters(), lr=0.1)
    prior_decay(model, full, where=everything)
    with pytest.raises(PatchError, match=r"0\.weight has a prior already"):
        prior_decay(model, full, where=everything)
