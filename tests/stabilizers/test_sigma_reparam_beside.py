import copy

import pytest
import torch
from torch import nn

from tameformer.optim import decay_groups
from tameformer.stabilizers.sigma_optimizer import SigmaBesideOptimizer
from tameformer.stabilizers.sigma_reparam import Rows, SigmaReparam, sigma_reparam
from zoo import FAMILIES, main_output

DATA = torch.linspace(-1, 1, 8 * 6).mul(7).sin().view(8, 6)


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))


def fused(name, module, parent):
    return {"0": Rows((4, 12)), "2": Rows((1, 2), groups=2)}[name]


def optimizer_of(model, beside=None, **settings):
    groups = [{"params": list(model.parameters())}]
    return torch.optim.AdamW(groups if beside is None else beside.groups(groups), lr=1e-3, weight_decay=0.0, **settings)


def train(model, optimizer, steps=50, parts=1):
    losses = []
    for _ in range(steps):
        for part in DATA.chunk(parts):
            loss = (model(part) - part).square().mean() / parts
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("settings", [{}, {"fused": True}], ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_same_training_as_parametrized(settings, parts):
    reference = model_of()
    sigma_reparam(reference, split=fused)
    expected = train(reference, optimizer_of(reference, **settings), parts=parts)
    model = model_of()
    beside = SigmaBesideOptimizer(model, split=fused)
    optimizer = optimizer_of(model, beside, **settings)
    beside.follow(optimizer)
    assert train(model, optimizer, parts=parts) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(model[0].weight, reference[0].weight, rtol=1e-4, atol=1e-5)
    assert (
        {int(one.updates) for one in reference.modules() if isinstance(one, SigmaReparam)} == {beside.updates} == {50}
    )


def test_starts_where_the_model_is_and_keeps_its_parameters():
    model = model_of()
    kept = [(name, parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()]
    beside = SigmaBesideOptimizer(model)
    for (name, parameter, value), (now, is_now) in zip(kept, model.named_parameters(), strict=True):
        assert name == now
        assert parameter is is_now
        assert torch.equal(parameter, value)
    assert beside.names == ["0.weight", "2.weight"]


def test_starts_at_the_same_weights_bit_for_bit():
    """Gamma over sigma has to be 1, for which both must be numbers of the same precision."""
    model = nn.Sequential(*(nn.Linear(5, 7) for _ in range(100)))
    kept = [layer.weight.detach().clone() for layer in model]
    SigmaBesideOptimizer(model)
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model, kept, strict=True))


def test_weights_without_a_gradient_stay_where_they_are():
    model = model_of()
    model[2].weight.requires_grad_(False)
    spare = nn.Linear(6, 6)
    beside = SigmaBesideOptimizer(nn.ModuleList([model, spare]), gamma=1.3)
    groups = [{"params": [*model.parameters(), *spare.parameters()]}]
    optimizer = torch.optim.AdamW(beside.groups(groups, gamma_settings={"weight_decay": 0.1}), lr=1e-2)
    beside.follow(optimizer)
    spare(model(DATA)).square().mean().backward()  # for once, so that its moments would move it
    optimizer.step()
    model.zero_grad()
    spare.zero_grad()
    before = copy.deepcopy(beside.state_dict())
    train(model, optimizer, 3)
    after = beside.state_dict()
    moved = {
        name for name, tensor in after.items() if name.endswith(("stored", "gamma")) and not tensor.equal(before[name])
    }
    assert moved == {"0.0.weight.stored", "0.0.weight.gamma"}


def test_groups_hold_each_once_without_decay_on_stored_weights():
    model = model_of()
    beside = SigmaBesideOptimizer(model)
    groups = beside.groups(decay_groups(model, weight_decay=0.1), gamma_settings={"weight_decay": 0.2})
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert len({id(parameter) for parameter in parameters}) == len(parameters) == 5
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.0), (2, 0.0), (1, 0.2)]
    assert not {id(parameter) for parameter in parameters} & {id(model[0].weight), id(model[2].weight)}


def test_an_optimizer_under_which_weights_would_stand_still_is_refused():
    model = model_of()
    beside = SigmaBesideOptimizer(model)
    with pytest.raises(ValueError, match=r"stored weight of 0\.weight, got one without it; build it over groups"):
        beside.follow(optimizer_of(model))
    both = [*beside.groups([{"params": list(model.parameters())}]), {"params": [model[2].weight]}]
    with pytest.raises(ValueError, match=r"stored weight of 2\.weight, got one over the weight itself"):
        beside.follow(torch.optim.SGD(both, lr=0.1))
    model[0].weight.requires_grad_(False)
    beside = SigmaBesideOptimizer(model)
    trained = [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]
    beside.follow(torch.optim.SGD(beside.groups(trained), lr=0.1))  # one that is frozen may be left out


@pytest.mark.parametrize("how", [lambda step, closure: step(closure), lambda step, closure: step(closure=closure)])
def test_a_closure_is_refused_whose_gradients_would_come_too_late(how):
    model = model_of()
    beside = SigmaBesideOptimizer(model)
    optimizer = optimizer_of(model, beside)
    beside.follow(optimizer)
    before = copy.deepcopy(beside.state_dict())
    with pytest.raises(ValueError, match=r"expected step\(\) after backward\(\), got step\(closure\)"):
        how(optimizer.step, lambda: model(DATA).sum().backward())
    assert all(torch.equal(tensor, before[name]) for name, tensor in beside.state_dict().items())
    optimizer.step(None)


def test_resumes_exactly():
    model = model_of()
    beside = SigmaBesideOptimizer(model)
    optimizer = optimizer_of(model, beside)
    beside.follow(optimizer)
    train(model, optimizer, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), beside.state_dict()))
    expected = train(model, optimizer, 5)
    fresh = model_of()
    again = SigmaBesideOptimizer(fresh)
    resumed = optimizer_of(fresh, again)
    again.follow(resumed)
    fresh.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    again.load_state_dict(saved[2])
    assert train(fresh, resumed, 5) == expected


def test_a_state_that_lacks_a_weight_changes_nothing():
    beside = SigmaBesideOptimizer(model_of())
    before = copy.deepcopy(beside.state_dict())
    state = {name: tensor + 1 for name, tensor in before.items() if name != "2.weight.right"}
    with pytest.raises(KeyError, match=r"got one without 2\.weight\.right and 0 more"):
        beside.load_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in beside.state_dict().items())


def test_weights_whose_memory_is_exchanged_are_followed():
    """As optimizers that look around, and averages of weights, do it: by `parameter.data = ...`."""

    def trained(exchange):
        model = model_of()
        beside = SigmaBesideOptimizer(model)
        optimizer = optimizer_of(model, beside)
        beside.follow(optimizer)
        train(model, optimizer, 2)
        if exchange:
            for parameter in [one for group in optimizer.param_groups for one in group["params"]]:
                parameter.data = parameter.data.clone()
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
        return train(model, optimizer, 5)

    assert trained(exchange=True) == trained(exchange=False)


def test_half_precision_layers_beside_full_precision_weights():
    model = model_of().bfloat16()
    beside = SigmaBesideOptimizer(model)
    optimizer = optimizer_of(model, beside)
    beside.follow(optimizer)
    model(DATA.bfloat16()).square().mean().backward()
    optimizer.step()
    assert model[0].weight.dtype == torch.bfloat16
    assert beside.state_dict()["0.weight.stored"].dtype == torch.float32


def test_layers_in_bf16_compute_under_autocast_what_it_would_round_fp32_to():
    def trained(dtype):
        model = model_of()
        beside = SigmaBesideOptimizer(model, split=fused, dtype=dtype)
        optimizer = optimizer_of(model, beside)
        beside.follow(optimizer)
        assert model[0].weight.dtype == (dtype or torch.float32)
        return train(torch.autocast("cpu", dtype=torch.bfloat16)(model), optimizer, 20), beside.state_dict()

    (losses, state), (rounded_losses, rounded_state) = trained(None), trained(torch.bfloat16)
    assert rounded_losses == losses
    assert all(torch.equal(rounded_state[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "name",
    ["torch-transformer", "vision", "bert-sdpa", "vit-sdpa", "gpt2-sdpa", "llama-sdpa", "t5-sdpa", "marian-sdpa"],
)
def test_layers_in_bf16_train_every_family_as_fp32_ones_do_under_autocast(name):
    def trained(dtype):
        torch.manual_seed(0)
        model, inputs, losses = FAMILIES[name].model(), FAMILIES[name].inputs(), []
        beside = SigmaBesideOptimizer(model, dtype=dtype)
        optimizer = optimizer_of(model, beside, fused=True)
        beside.follow(optimizer)
        for seed in range(3):
            torch.manual_seed(seed)  # of dropout
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = main_output(model(**inputs))
            losses.append(output.float().square().mean())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in losses], beside.state_dict()

    (losses, state), (rounded_losses, rounded_state) = trained(None), trained(torch.bfloat16)
    assert rounded_losses == losses
    assert all(torch.equal(rounded_state[key], tensor) for key, tensor in state.items())


def test_embeddings_stay_in_fp32_beside_layers_in_bf16():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "hidden": nn.Linear(4, 4), "out": nn.Linear(4, 5)})
    model["out"].weight = model["embedding"].weight
    SigmaBesideOptimizer(model, dtype=torch.bfloat16)
    assert [model[name].weight.dtype for name in model] == [torch.float32, torch.bfloat16, torch.float32]


def test_ties_stay():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "out": nn.Linear(4, 5)})
    model["out"].weight = model["embedding"].weight
    beside = SigmaBesideOptimizer(model)
    optimizer = optimizer_of(model, beside)
    beside.follow(optimizer)
    before = model["out"].weight.detach().clone()
    model["out"](model["embedding"](torch.tensor([1, 2]))).square().sum().backward()
    optimizer.step()
    assert model["out"].weight is model["embedding"].weight
    assert not torch.equal(model["out"].weight, before)
