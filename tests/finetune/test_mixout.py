import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tameformer.errors import PatchError
from tameformer.finetune import layer_decay_groups, mixout, per_neuron, per_weight
from tameformer.finetune.mixout import mixed
from tameformer.patch import is_linear

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")
FAMILIES = ["bert", "vit", "gpt2", "llama", "t5", "bart", "torch", "encoder", "decoder", "vision"]


def encoder(seed=0):
    torch.manual_seed(seed)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)


@pytest.mark.parametrize("draw", [(3, 4), (1, 4)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_gradient_is_that_of_the_function(p, draw):
    weight, target = torch.randn(2, 3, 4, dtype=torch.float64).unbind()

    def function(weight):
        torch.manual_seed(5)  # the same mask each time
        return mixed(weight, target, p, draw).square()

    assert torch.autograd.gradcheck(function, [weight.requires_grad_()])


@pytest.mark.parametrize("draw", [per_weight, per_neuron])
def test_against_the_formula_of_the_paper(draw):
    p, weight, target = 0.7, *torch.randn(2, 40, 50, dtype=torch.float64).unbind()
    weight.requires_grad_()
    shape = draw((40, 50), False)
    torch.manual_seed(3)
    found = mixed(weight, target, p, shape)
    found.sum().backward()
    gone = (found - (target - p * target) / (1 - p)).abs() < 1e-12  # where M is 0, equation 7 leaves W0
    kept = (~gone).double()
    by_hand = ((1 - kept) * target + kept * weight - p * target) / (1 - p)
    torch.testing.assert_close(found, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, kept / (1 - p), rtol=1e-12, atol=1e-12)
    assert gone.double().mean() == pytest.approx(p, abs=0.25 if draw is per_neuron else 0.04)
    columns = gone.all(0) | (~gone).all(0)
    assert columns.all() if draw is per_neuron else not columns.any()


def test_the_mean_is_the_weight():
    weight, target = torch.randn(2, 4, dtype=torch.float64).unbind()
    torch.manual_seed(0)
    draws = torch.stack([mixed(weight, target, 0.6, (4,)) for _ in range(20_000)])
    deviation = (weight - target).abs() * (0.6 / 0.4) ** 0.5 / 20_000**0.5
    assert ((draws.mean(0) - weight).abs() < 5 * deviation).all()


def test_a_neuron_is_an_input_also_where_the_weight_is_stored_transposed(build):
    model = build("gpt2").train()
    mixout(model, 0.5, draw=per_neuron)
    layer = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(1.0)
    is_target = layer.weight == layer.parametrizations.weight[0].target
    assert is_target.any()
    assert not is_target.all()
    assert (is_target.all(1) | ~is_target.any(1)).all()  # rows are inputs here


@pytest.mark.parametrize("family", FAMILIES)
def test_families_start_the_same_and_come_back_exactly(family, build):
    model = build(family)
    before = {name: (id(one), one.clone()) for name, one in model.named_parameters()}
    keys = list(model.state_dict())
    handle = mixout(model, 0.9)
    assert all("lm_head" not in name and "classifier" not in name and "embed" not in name for name in handle.names)
    weights = [model.get_submodule(name.rpartition(".")[0]) for name in handle.names]
    for name, owner in zip(handle.names, weights, strict=True):
        torch.testing.assert_close(getattr(owner, name.rpartition(".")[2]), before[name][1])  # W is W0 still
    groups = layer_decay_groups(model, lr=1.0)
    assert sum(len(group["params"]) for group in groups) == len(before)
    (handle.bake if family == "bert" else handle.remove)()
    assert list(model.state_dict()) == keys
    assert [(name, id(one)) for name, one in model.named_parameters()] == [
        (name, one) for name, (one, _) in before.items()
    ]
    assert all(torch.equal(one, before[name][1]) for name, one in model.named_parameters())


def test_training_mixes_and_evaluation_does_not():
    model, reference = encoder(), encoder(1)
    handle = mixout(model, 0.5)
    model.load_state_dict({**model.state_dict(), **moved_to(model, reference)})
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=0, atol=1e-6)
    model.train()
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    torch.manual_seed(4)
    first = model(x)
    torch.manual_seed(4)
    assert torch.equal(first, model(x))  # what a seeded step draws is a function of its seed
    handle.remove()
    torch.testing.assert_close(model.eval()(x), reference(x), rtol=0, atol=1e-6)


def moved_to(model, reference):
    """The reference's weights under the names that they have in a patched model."""
    given, state = reference.state_dict(), {}
    for name in model.state_dict():
        plain = name.replace("parametrizations.", "").replace(".original", "")
        if plain in given:
            state[name] = given[plain]
    return state


def test_p_of_zero_is_the_weight_to_the_bit():
    model = encoder()
    x = torch.randn(2, 5, 8)
    mixout(model, 0.0)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1)
    plain = encoder()
    plain.load_state_dict(
        {k.replace("parametrizations.", "").replace(".original", ""): v for k, v in model.state_dict().items()},
        strict=False,
    )
    assert torch.equal(model(x), plain(x))


def test_the_target_is_saved_moved_and_copied():
    model = encoder()
    mixout(model, 0.5)
    state = model.state_dict()
    names = [name for name in state if name.endswith("target")]
    assert len(names) == 8
    other = encoder(1)
    mixout(other, 0.5)
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in names)
    assert {model.to(torch.bfloat16).state_dict()[name].dtype for name in names} == {torch.bfloat16}
    model(torch.randn(1, 3, 8, dtype=torch.bfloat16)).sum().backward()
    with torch.device("meta"):
        empty = encoder()
    mixout(empty, 0.5)
    empty.to_empty(device="cpu").load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in empty.state_dict().items())
    twin = copy.deepcopy(other)
    twin.layers[0].linear1.parametrizations.weight[0].target.add_(1.0)
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in names)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_draws_the_same(use_reentrant):
    model = encoder().train()
    mixout(model, 0.5)
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.1 * torch.randn_like(one))
    x = torch.randn(2, 5, 8)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(7)
        h = x.clone().requires_grad_()
        for layer in model.layers:
            h = checkpoint(layer, h, use_reentrant=use_reentrant) if recompute else layer(h)
        model.zero_grad()
        h.square().sum().backward()
        gradients.append([one.grad.clone() for one in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_it_holds_the_weights_near_what_they_were():
    """Lee et al. 2020, corollary 4: mixout acts as a pull toward the target, stronger for larger p."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 16), torch.randn(64, 1)
    distances = []
    for p in (0.0, 0.3, 0.6):
        torch.manual_seed(1)
        model = nn.Linear(16, 1)
        start = model.weight.detach().clone()
        mixout(model, p, where=lambda name, module: name == "")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        distances.append((model.parametrizations.weight.original - start).norm().item())
    assert distances[0] > distances[1] > distances[2]


def test_what_cannot_be_mixed_is_refused_by_name(build):
    model = build("gpt2")
    with pytest.raises(PatchError, match=r"lm_head\.weight is tied to another weight"):
        mixout(model, where=is_linear)
    assert not any("parametrizations" in name for name in model.state_dict())
    model = encoder()
    mixout(model)
    with pytest.raises(PatchError, match=r"layers\.0\.self_attn\.in_proj_weight is patched already"):
        mixout(model)
    with pytest.raises(ValueError, match="expected p from 0 to below 1, got 1"):
        mixout(encoder(), 1.0)
    with pytest.raises(PatchError, match="looked for linear layers inside repeated layers"):
        mixout(nn.Linear(2, 2))
