import pytest
import torch
from torch import nn

from tameformer.models import EncoderConfig, encoder
from tameformer.patch import Observation
from tameformer.probes.update_ratio import UpdateRatio, sampled
from tameformer.stabilizers.sigma_reparam import sigma_reparam


def observe(model, optimizer, probe, loss):
    with Observation(model, [probe], optimizers=[optimizer]).watching():
        loss().backward()
        optimizer.step()
    return probe.read()


def by_copies(model, before):
    """Ratios of all matrices from full copies in float64."""
    return {
        name: ((p.detach().double() - before[name]).norm() / before[name].norm()).float()
        for name, p in model.named_parameters()
    }


def copies(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def trained(entries, steps=3):
    """The ratios of a model's last step, sampled and exact, by weight."""
    torch.manual_seed(0)
    model = encoder(EncoderConfig(dim=128, num_layers=2, num_heads=4, max_length=16), vocab_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = UpdateRatio(model, entries=entries)
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = torch.randint(0, 64, (4, 16))
        before = copies(model)
        values = observe(
            model, optimizer, probe, lambda tokens=tokens: (model(tokens) * torch.linspace(-1, 1, 128)).sum()
        )
    exact = by_copies(model, before)
    return {key.removeprefix("diag/update_ratio/"): value for key, value in values.items()}, exact


def test_is_exact_where_the_sample_is_the_whole_weight():
    values, exact = trained(entries=2**16)
    assert len(values) == 12
    assert all("embedding" not in name and "table" not in name for name in values)
    torch.testing.assert_close(values, {name: exact[f"{name}.weight"] for name in values}, rtol=1e-4, atol=0)


def test_a_sample_is_near():
    values, exact = trained(entries=4096)
    errors = torch.stack([values[name] / exact[f"{name}.weight"] - 1 for name in values])
    assert errors.square().mean().sqrt() < 0.06
    assert errors.abs().max() > 0  # it is a sample


def test_the_sample_spreads_over_rows_and_columns_and_reads_each_entry_once():
    entries = sampled(torch.arange(256.0 * 1024).reshape(256, 1024), 4096).flatten()
    assert len(entries.unique()) == 4096
    assert entries.max() > 255 * 1024
    counts = torch.histc(entries % 1024, bins=8, min=0, max=1024)
    assert counts.min() > 0
    transposed = torch.arange(12.0).reshape(3, 4).T
    assert sampled(transposed, 32).flatten().sort().values.tolist() == list(range(12))


def test_sgd_gives_the_ratio_known_beforehand():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False).requires_grad_(False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.init.ones_(model[0].weight)
    nn.init.eye_(model[1].weight)
    values = observe(model, optimizer, UpdateRatio(model), lambda: model(torch.ones(3)).sum())
    torch.testing.assert_close(values, {"diag/update_ratio/0": torch.tensor(0.1)})  # a frozen weight has no update


def test_zero_weights_non_finite_updates_and_missing_updates():
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])
    nn.init.zeros_(model[0].weight)
    probe = UpdateRatio(model)
    probe.on_begin()
    with torch.no_grad():
        model[1].weight.fill_(torch.nan)
    probe.on_update()
    values = probe.read()
    assert values["diag/update_ratio/0"] == 0  # nothing moved
    assert values["diag/update_ratio/1"].isnan()
    assert values["diag/update_ratio/2"] == 0
    probe.on_begin()
    assert probe.read() == {}
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    probe.on_update()
    assert probe.read()["diag/update_ratio/0"] == torch.inf


def test_half_precision_weights_are_compared_in_fp32():
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    probe, before = UpdateRatio(model), copies(model)
    probe.on_begin()
    with torch.no_grad():
        model.weight += 0.01 * torch.randn(64, 64, dtype=torch.bfloat16)
    probe.on_update()
    torch.testing.assert_close(probe.read()["diag/update_ratio/weight"], by_copies(model, before)["weight"])


@pytest.mark.parametrize("entries", [0, 100])
def test_refuses_entries_that_runs_do_not_divide(entries):
    with pytest.raises(ValueError, match=f"multiple of 32, got {entries}"):
        UpdateRatio(nn.Linear(2, 2), entries=entries)


def test_a_weight_that_sigma_reparam_computes_is_measured_as_it_acts():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    layer = model.layers[0]
    sigma_reparam(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def acting():
        with torch.no_grad():
            return {
                "linear1": layer.linear1.weight.double(),
                "linear2": layer.linear2.weight.double(),
                "self_attn.out_proj": layer.self_attn.out_proj.weight.double(),
                **{
                    f"self_attn.in_proj[{i}]": p.double() for i, p in enumerate(layer.self_attn.in_proj_weight.chunk(3))
                },
            }

    probe = UpdateRatio(model)
    for _ in range(5):
        optimizer.zero_grad()
        batch, before = torch.randn(4, 8, 16), acting()
        values = observe(model, optimizer, probe, lambda batch=batch: (model(batch) * torch.linspace(-1, 1, 16)).sum())
        after = acting()
    assert not probe.unseen
    assert values.keys() == {f"diag/update_ratio/layers.0.{name}" for name in before}
    for name in before:
        exact = (after[name] - before[name]).norm() / before[name].norm()
        torch.testing.assert_close(values[f"diag/update_ratio/layers.0.{name}"], exact.float(), rtol=1e-2, atol=0)
