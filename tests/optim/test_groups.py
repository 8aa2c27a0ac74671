import pytest
import torch
from torch import nn

from tameformer.models.decoder import DecoderConfig, decoder
from tameformer.optim import LARS, OptimConfig, Rule, decay_groups, is_any, is_matrix, optimizers, parameter_groups
from tameformer.optim.lars import trust_ratio


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def test_every_parameter_of_a_tied_model_in_exactly_one_group():
    model = decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, tie_embeddings=True), vocab_size=10)
    groups = decay_groups(model, weight_decay=0.1)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted({id(parameter) for parameter in model.parameters()})
    names = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert all(decay == 0.0 for name, decay in names.items() if "bias" in name or "norm" in name or "embedding" in name)
    assert any(decay == 0.1 for decay in names.values())


def test_first_rule_wins_and_frozen_parameters_are_left_out():
    model = small_model()
    model[3].weight.requires_grad_(False)
    head = Rule("head", lambda name, module, parameter: name.startswith("3."), {"lr": 1.0})
    groups = parameter_groups(model, [head, Rule("matrices", is_matrix), Rule("rest", is_any)])
    assert [group["param_names"] for group in groups] == [
        ["3.bias"],
        ["1.weight"],
        ["0.weight", "1.bias", "2.weight", "2.bias"],
    ]


def test_a_parameter_without_a_rule_and_a_rule_without_a_parameter_are_errors():
    with pytest.raises(ValueError, match=r"no rule selects parameter 0\.weight"):
        parameter_groups(small_model(), [Rule("matrices", is_matrix)])
    nothing = Rule("nothing", lambda name, module, parameter: False)
    with pytest.raises(ValueError, match="rule nothing selects no parameter of Sequential"):
        parameter_groups(small_model(), [nothing, Rule("rest", is_any)])


@pytest.mark.parametrize("name", ["adamw", "adam", "radam", "stable_adamw", "sgd", "lars", "muon"])
def test_each_optimizer_learns(name):
    model = small_model()
    built = optimizers(model, OptimConfig(name=name, peak_lr=0.5 if name == "lars" else 0.02, weight_decay=0.001))
    held = [id(p) for optimizer in built for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    inputs, labels = torch.arange(5), torch.tensor([0, 1, 2, 0, 1])
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        losses.append(loss.item())
        loss.backward()
        for optimizer in built:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_muon_takes_hidden_matrices_only():
    model = decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2), vocab_size=10)
    muon, adamw = optimizers(model, OptimConfig(name="muon"), is_hidden=lambda name: ".layers." in name)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])
    tables = [id(model.embedding.weight)]
    assert tables[0] in [id(p) for group in adamw.param_groups for p in group["params"]]


def test_lars_step_by_hand():
    """You et al. 2017, algorithm 1, two steps in float64."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    by_hand, velocity = weight.detach().clone(), torch.zeros(3, 4, dtype=torch.float64)
    optimizer = LARS([weight], lr=0.3, momentum=0.9, weight_decay=0.01, trust=0.02)
    for _ in range(2):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        local = 0.02 * by_hand.norm() / (gradient.norm() + 0.01 * by_hand.norm())
        velocity = 0.9 * velocity + 0.3 * local * (gradient + 0.01 * by_hand)
        by_hand = by_hand - velocity
        torch.testing.assert_close(weight.detach(), by_hand, rtol=1e-14, atol=1e-14)


def test_lars_trust_ratio_of_a_zero_weight_is_one():
    assert trust_ratio(torch.zeros(2), torch.ones(2), weight_decay=0.1, trust=0.001) == 1.0
