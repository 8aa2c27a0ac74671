import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tameformer.models import DecoderConfig, decoder
from tameformer.patch import Observation
from tameformer.probes.dead_units import DeadUnits, dead_share, spread_rows, stacked


def share_by_loop(output):
    units = output.detach().flatten(0, -2).T
    return sum(all(float(value) <= 0 for value in unit) for unit in units) / len(units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", [nn.functional.relu, nn.functional.gelu, nn.functional.silu])
def test_the_share_agrees_with_a_loop(activation, dtype):
    generator = torch.Generator().manual_seed(0)
    output = activation(torch.randn(2, 3, 40, generator=generator) - 1.0).to(dtype)
    assert 0 < share_by_loop(output) < 1
    assert float(dead_share(output)) == pytest.approx(share_by_loop(output))


def test_non_finite_units_are_reported():
    for bad in (torch.nan, torch.inf):
        output = torch.rand(3, 4)
        output[1, 2] = bad
        assert dead_share(output).isnan()


@given(batch=st.integers(1, 40), seq=st.integers(1, 70), limit=st.integers(1, 64))
def test_spread_rows_are_spread_over_sequences_and_positions(batch, seq, limit):
    x = torch.arange(float(batch * seq)).reshape(batch, seq, 1)
    rows = spread_rows(x, limit).flatten().long()
    assert 1 <= len(rows) <= limit
    if batch * seq <= limit:
        assert len(rows) == batch * seq
        return
    spacing = int(rows[1] - rows[0]) if len(rows) > 1 else batch * seq
    assert rows.tolist() == list(range(0, batch * seq, spacing))
    if len(rows) > 1:
        assert math.gcd(spacing, seq) == 1
        # any neighbouring rows, as many as a sequence has tokens, stand at positions that are all different
        assert len(set((rows[:seq] % seq).tolist())) == len(rows[:seq])


def test_layers_of_other_shapes_and_types_are_stacked_apart():
    one, two, wide = torch.zeros(2), torch.ones(2), torch.ones(3)
    parts = {"a": [one, wide], "b": [wide, wide], "c": [two, wide], "d": [one.double(), wide]}
    found = {tuple(layers): tensors for layers, tensors in stacked(parts)}
    assert list(found) == [("a", "c"), ("b",), ("d",)]
    torch.testing.assert_close(found["a", "c"], [torch.stack([one, two]), torch.stack([wide, wide])])
    assert not list(stacked({}))


def test_no_limit_is_every_row_without_a_copy():
    x = torch.randn(3, 4, 5)
    assert torch.equal(spread_rows(x, None), x.flatten(0, 1))
    assert spread_rows(x, 5).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_our_layers_with_units_closed_on_purpose(activation):
    torch.manual_seed(0)
    config = DecoderConfig(dim=16, num_layers=2, num_heads=2, hidden_dim=32, activation=activation, max_length=8)
    model, probe = decoder(config, vocab_size=11), DeadUnits(tokens=None)
    opening = model.stack.layers[1].feed_forward.branch
    opening = opening.gate if activation == "swiglu" else opening.up
    with torch.no_grad():
        opening.bias[:8] = -100.0
    with Observation(model, [probe]).watching():
        model(torch.arange(32).reshape(4, 8) % 11)
    values = {key: float(value) for key, value in probe.read().items()}
    assert values["diag/dead_units/stack.layers.0.feed_forward.branch"] == 0
    assert values["diag/dead_units/stack.layers.1.feed_forward.branch"] == 8 / 32
    assert len(values) == 2


def test_torch_layers_agree_with_a_loop():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.0, batch_first=True)
    model, x, outputs = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 16), []
    for block in model.layers:
        block.linear1.register_forward_hook(lambda module, args, output: outputs.append(output.relu()))
    probe, few = DeadUnits(), DeadUnits(tokens=3)
    with Observation(model, [probe, few]).watching():
        model(x)
    assert len(outputs) == 2
    for index, output in enumerate(outputs):
        assert float(probe.read()[f"diag/dead_units/layers.{index}"]) == pytest.approx(share_by_loop(output))
        expected = share_by_loop(output.flatten(0, 1)[[0, 4, 8]])
        assert float(few.read()[f"diag/dead_units/layers.{index}"]) == pytest.approx(expected)


def test_llama_agrees_with_a_loop_and_a_step_forgets_the_one_before():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    outputs = []
    mlp = model.model.layers[0].mlp
    mlp.gate_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
    probe = DeadUnits()
    observation = Observation(model, [probe])
    with observation.watching():
        model(torch.arange(8).reshape(2, 4))
    value = float(probe.read()["diag/dead_units/model.layers.0.mlp"])
    assert value == pytest.approx(share_by_loop(outputs[0]))
    assert value > 0
    with observation.watching():
        assert not probe.read()
