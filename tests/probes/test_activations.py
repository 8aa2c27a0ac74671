import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tameformer.models import DecoderConfig, decoder
from tameformer.patch import Observation, blocks
from tameformer.probes.activations import Activations, activation_statistics


def by_definition(x):
    entries = [float(entry) for entry in x.detach().double().flatten()]
    mean = sum(entries) / len(entries)
    second, fourth = (sum((entry - mean) ** power for entry in entries) / len(entries) for power in (2, 4))
    rms = (sum(entry**2 for entry in entries) / len(entries)) ** 0.5
    return rms, max(abs(entry) for entry in entries), fourth / second**2


def assert_measured(values, block, expected):
    for quantity, number in zip(("rms", "absmax", "kurtosis"), expected, strict=True):
        value = values[f"diag/activation_{quantity}/{block}"]
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert float(value) == pytest.approx(number, rel=1e-5), quantity


@given(
    scale=st.sampled_from([1e-15, 1e-3, 1.0, 1e6, 1e25]),
    shift=st.floats(-3, 3),
    outlier=st.sampled_from([1.0, 1e3]),
    seed=st.integers(0, 1000),
)
def test_statistics_agree_with_their_definitions_at_every_size(scale, shift, outlier, seed):
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(seed)) + shift
    x[0, 0, 0] *= outlier
    found = [float(value) for value in activation_statistics(x * scale)]
    assert found == pytest.approx(by_definition(x * scale), rel=2e-5)


def test_kurtosis_of_known_distributions():
    normal = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    assert float(activation_statistics(normal * 5 + 2)[2]) == pytest.approx(3, abs=0.05)
    spike = torch.zeros(1000)
    spike[3] = -7.0
    rms, largest, kurtosis = activation_statistics(spike)
    assert float(largest) == 7.0
    assert float(rms) == pytest.approx(7 / 1000**0.5)
    assert float(kurtosis) == pytest.approx(1000, rel=0.01)
    assert [float(value) for value in activation_statistics(torch.full((4, 4), -2.5))] == [2.5, 2.5, 0.0]
    assert [float(value) for value in activation_statistics(torch.zeros(4))] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_entries_are_reported(bad):
    x = torch.randn(2, 3, 4)
    x[1, 2, 3] = bad
    rms, largest, kurtosis = activation_statistics(x)
    assert rms.isnan()
    assert kurtosis.isnan()
    assert largest.isnan() if bad != bad else largest == torch.inf


def test_half_precision_is_measured_in_float32():
    x = (torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 300).to(torch.bfloat16)
    assert [float(value) for value in activation_statistics(x)] == pytest.approx(by_definition(x), rel=1e-5)


def ours():
    return decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, max_length=8), vocab_size=11)


def llama():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, intermediate_size=32, **heads)
    )


@pytest.mark.parametrize("build", [ours, llama])
def test_each_layer_of_a_model_is_measured(build):
    torch.manual_seed(0)
    model, outputs = build(), {}
    for name, block in blocks(model).items():
        block.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output.detach()}))
    few, everything = Activations(tokens=5), Activations(tokens=None)
    with Observation(model, [few, everything]).watching():
        model(torch.arange(24).reshape(3, 8) % 11)
    assert len(outputs) == 2
    assert len(few.read()) == 6
    for name, output in outputs.items():
        assert_measured(few.read(), name, by_definition(output.flatten(0, 1)[::5]))
        assert_measured(everything.read(), name, by_definition(output))


def test_a_step_forgets_the_one_before_and_a_repeated_layer_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(1)])

        def forward(self, x):
            return self.layers[0](self.layers[0](x))

    model, probe = Twice(), Activations()
    observation, x = Observation(model, [probe]), torch.randn(2, 3, 4)
    with observation.watching():
        model(x)
    assert_measured(probe.read(), "layers.0", by_definition(model.layers[0](x).detach()))
    with observation.watching():
        assert not probe.read()
