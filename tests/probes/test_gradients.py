import json

import pytest
import torch
from torch import nn

from tameformer.models import EncoderConfig, encoder
from tameformer.optim import clip_norm
from tameformer.patch import Observation
from tameformer.probes import Watch, gradients
from tameformer.probes.gradients import GradientNorm, GradientOverEpsilon
from tameformer.recipes.launch import train
from tameformer.stabilizers.sigma_reparam import sigma_reparam


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return transformers.BertModel(config), torch.arange(8)[None], lambda output: output.last_hidden_state


MODELS = {
    "ours": lambda: (
        encoder(EncoderConfig(dim=32, num_layers=2, num_heads=2), vocab_size=64),
        torch.arange(8)[None],
        lambda output: output,
    ),
    "torch": lambda: (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2),
        torch.randn(1, 8, 32),
        lambda output: output,
    ),
    "bert": bert,
}


def observe(model, optimizer, probes, loss):
    with Observation(model, probes, optimizers=[optimizer]).watching():
        loss().backward()
        optimizer.step()
    return {key: value for probe in probes for key, value in probe.read().items()}


@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_a_float64_loop_over_modules(name):
    torch.manual_seed(0)
    model, inputs, output = MODELS[name]()
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-6)
    norms = GradientNorm(model)
    values = observe(
        model,
        optimizer,
        [norms, GradientOverEpsilon(model, [optimizer], norms=norms)],
        lambda: (output(model(inputs)) * torch.linspace(-1, 1, 32)).sum(),
    )
    expected = {}
    for module_name, module in model.named_modules():
        gradients = [p.grad.double().flatten() for p in module.parameters(recurse=False) if p.grad is not None]
        if gradients:
            joint = torch.cat(gradients)
            expected[f"diag/grad_norm/{module_name}"] = joint.norm().float()
            expected[f"diag/grad_rms_over_epsilon/{module_name}"] = (joint.square().mean().sqrt() / 1e-6).float()
    assert len(expected) > 20
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)


def test_the_pass_over_the_gradients_is_shared_and_each_probe_stands_alone(monkeypatch):
    passes = []
    taken = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *args: passes.append(1) or taken(*args))
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    norms = GradientNorm(model)
    both = [norms, GradientOverEpsilon(model, [optimizer], norms=norms)]
    values = observe(model, optimizer, both, lambda: model(torch.ones(3)).sum())
    assert len(passes) == 1
    assert set(values) == {
        f"diag/{quantity}/{name}"
        for quantity in ("grad_norm", "grad_rms_over_epsilon")
        for name in ("weight", "bias")  # parameters of the model itself
    }
    optimizer.zero_grad()
    alone = observe(model, optimizer, both[1:], lambda: (3 * model(torch.ones(3))).sum())
    assert alone["diag/grad_rms_over_epsilon/weight"] == pytest.approx(3e8)
    assert alone["diag/grad_rms_over_epsilon/bias"] == pytest.approx(3e8)


def test_different_epsilons_in_one_module_each_count_for_their_entries():
    model = nn.Sequential(nn.Linear(4, 2))
    groups = [{"params": [model[0].weight], "eps": 1e-2}, {"params": [model[0].bias], "eps": 1e-4}]
    optimizer = torch.optim.Adam(groups)
    probe = GradientOverEpsilon(model, [optimizer])
    values = observe(model, optimizer, [probe], lambda: model(torch.full((4,), 0.5)).sum())
    expected = (torch.tensor([0.5 / 1e-2] * 8 + [1 / 1e-4] * 2)).square().mean().sqrt()
    torch.testing.assert_close(values, {"diag/grad_rms_over_epsilon/0": expected})


def test_optimizers_without_epsilon_and_parameters_without_optimizer_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    adam, sgd = torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[1].parameters(), lr=0.1)
    probe = GradientOverEpsilon(model, [adam, sgd])
    with Observation(model, [probe], optimizers=[adam, sgd]).watching():
        model(torch.ones(2)).sum().backward()
        adam.step()
        sgd.step()
    assert set(probe.read()) == {"diag/grad_rms_over_epsilon/0"}
    assert probe.unseen == {
        "1.weight": "SGD has eps=None, not a number above 0",
        "2.weight": "in no optimizer",
    }


def test_tied_frozen_sparse_and_unused_parameters():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "first": nn.Linear(4, 4, bias=False),
            "tied": nn.Linear(4, 4, bias=False),
            "frozen": nn.Linear(4, 4, bias=False).requires_grad_(False),
            "unused": nn.Linear(4, 4),
            "sparse": nn.Embedding(5, 4, sparse=True),
        }
    )
    model["tied"].weight = model["first"].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.tensor([1, 1, 3])

    def loss():
        return (model["frozen"](model["tied"](model["first"](model["sparse"](tokens)))) ** 2).sum()

    values = observe(model, optimizer, [GradientNorm(model)], loss)
    expected = {
        "diag/grad_norm/first": model["first"].weight.grad.norm(),
        "diag/grad_norm/sparse": model["sparse"].weight.grad.to_dense().norm(),
    }
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gradients_pass_through_in_their_module_only(bad):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    probes = [GradientNorm(model), GradientOverEpsilon(model, [optimizer])]
    model[0].weight.register_hook(lambda gradient: gradient * bad)
    values = observe(model, optimizer, probes, lambda: model(torch.ones(2)).sum())
    assert not values["diag/grad_norm/0"].isfinite()
    assert not values["diag/grad_rms_over_epsilon/0"].isfinite()
    assert values["diag/grad_norm/1"].isfinite()
    assert values["diag/grad_rms_over_epsilon/1"].isfinite()


def test_half_precision_gradients_are_summed_in_fp32():
    model = nn.Sequential(nn.Linear(300, 300, bias=False)).to(torch.float16)
    model[0].weight.grad = torch.full((300, 300), 1000.0, dtype=torch.float16)  # the norm is beyond float16
    probe = GradientNorm(model)
    probe.on_begin()
    probe.on_gradients()
    torch.testing.assert_close(probe.read(), {"diag/grad_norm/0": torch.tensor(300_000.0)}, rtol=1e-4, atol=0)


def test_a_step_without_gradients_leaves_nothing_of_the_step_before():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    probes = [GradientNorm(model), GradientOverEpsilon(model, [optimizer])]
    assert observe(model, optimizer, probes, lambda: model(torch.ones(2)).sum())
    optimizer.zero_grad()
    with Observation(model, probes, optimizers=[optimizer]).watching():
        optimizer.step()
    assert [probe.read() for probe in probes] == [{}, {}]


def test_norms_that_clipping_computed_are_taken_over(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    groups = [
        {"params": [model[1].weight, model[0].bias]},
        {"params": [model[0].weight, model[1].bias]},
    ]  # another order
    optimizer = torch.optim.SGD(groups, lr=0.1)
    watch = Watch(model, [(GradientNorm(model), 1)], optimizers=[optimizer])

    def step(watch, tell_norms):
        with watch.watching(1):
            model(torch.randn(2, 5, generator=torch.Generator().manual_seed(0))).square().sum().backward()
            clip_norm((p for group in groups for p in group["params"]), 0.01, tell_norms=tell_norms)
            optimizer.step()
        optimizer.zero_grad()
        return watch.read()

    state = {name: value.clone() for name, value in model.state_dict().items()}
    own = step(watch, None)
    model.load_state_dict(state)
    with monkeypatch.context() as patched:
        patched.setattr(gradients, "_norms", lambda _: pytest.fail("the gradients were read again"))
        taken = step(watch, watch.tell_norms)
    torch.testing.assert_close(taken, own)
    assert torch.stack(list(own.values())).norm() == pytest.approx(0.01)
    assert step(watch, None).keys() == own.keys()  # what was told of one step does not serve the next


def test_the_training_loop_hands_them_on(monkeypatch, tmp_path):
    monkeypatch.setattr(gradients, "_norms", lambda _: pytest.fail("the gradients were read again"))
    overrides = {"max_steps": 2, "output_dir": str(tmp_path), "probes": {"grad_norm": 1, "grad_rms_over_epsilon": 2}}
    train("vit-digits", overrides=overrides)
    (first, second) = map(json.loads, (tmp_path / "probes.jsonl").read_text().splitlines())
    assert any(key.startswith("diag/grad_norm/") for key in first)
    assert any(key.startswith("diag/grad_rms_over_epsilon/") for key in second)


def test_a_parametrized_weight_counts_with_its_module():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    plain = GradientNorm(layer)
    loss = lambda: layer(torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))).square().sum()  # noqa: E731
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    names = observe(layer.eval(), optimizer, [plain], loss).keys()
    sigma_reparam(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    norms = GradientNorm(layer)
    values = observe(layer, optimizer, [norms, GradientOverEpsilon(layer, [optimizer], norms=norms)], loss)
    assert values.keys() == names
    joint = [p.grad.flatten() for name, p in layer.named_parameters() if name.startswith("linear1.")]
    assert len(joint) == 3
    torch.testing.assert_close(values["diag/grad_norm/linear1"], torch.cat(joint).norm())
