import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tameformer.models import DecoderConfig, decoder
from tameformer.nn.attention import DotProductAttention
from tameformer.patch import Observation
from tameformer.probes.head_output import HeadOutput, head_output


def by_loop(output):
    """Mean squared deviation of each head from its mean over the positions of its sequence."""
    output = output.double()
    squares = []
    for head in range(output.shape[1]):
        deviations = [sequence - sequence.mean(0) for sequence in output[:, head]]
        squares.append(torch.stack(deviations).square().mean())
    squares = torch.stack(squares)
    return (squares / squares.mean()).sqrt().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agreement_with_a_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    sizes, offsets = torch.tensor([1.0, 0.1, 5.0, 1e-3]), torch.randn(4, 1, 6, generator=generator)
    output = (torch.randn(3, 4, 7, 6, generator=generator) * sizes[:, None, None] + offsets).to(dtype)
    found = head_output(output)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_loop(output), rtol=1e-3 if dtype == torch.float32 else 1e-2, atol=1e-6)
    assert float(found.square().mean()) == pytest.approx(1)


def test_a_constant_head_is_dead_however_large():
    output = torch.randn(2, 3, 8, 4)
    output[:, 1] = 100.0 * torch.randn(2, 1, 4)  # each sequence its own constant
    assert head_output(output)[1] < 1e-4
    assert (head_output(output)[[0, 2]] > 0.8).all()
    assert torch.equal(head_output(torch.zeros(2, 3, 8, 4)), torch.zeros(3))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_entries_are_reported(bad):
    output = torch.randn(2, 3, 8, 4)
    output[1, 1, 1, 1] = bad
    assert head_output(output)[1].isnan()


def test_a_head_closed_on_purpose_in_our_layers():
    torch.manual_seed(0)
    config = DecoderConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, max_length=8)
    model, probe, few, outputs = decoder(config, vocab_size=11), HeadOutput(), HeadOutput(positions=3), []
    value = model.stack.layers[1].attention.branch.value
    with torch.no_grad():
        value.weight[:8] = 0.0  # values of the first key-value head, so of two query heads
        value.bias[:8] = 3.0
    for module in model.modules():
        if isinstance(module, DotProductAttention):
            module.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    with Observation(model, [probe, few]).watching():
        model(torch.arange(16).reshape(2, 8) % 11)
    assert len(probe.read()) == len(outputs) == 2
    for index, output in enumerate(outputs):
        key = f"diag/head_output/stack.layers.{index}.attention.branch"
        torch.testing.assert_close(few.read()[key], by_loop(output[:1, :, [0, 3, 6]]), rtol=1e-4, atol=1e-5)
        found = probe.read()[key]
        torch.testing.assert_close(found, by_loop(output[:1]), rtol=1e-4, atol=1e-5)
    assert (found[:2] < 1e-4).all()
    assert (found[2:] > 0.5).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bert(implementation):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        attn_implementation=implementation,
    )
    model, probe, outputs = BertModel(config).eval(), HeadOutput(), {}
    for name, module in model.named_modules():
        if name.endswith("attention.self"):
            module.register_forward_hook(
                lambda module, args, output, name=name: outputs.update({name: output[0].detach()})
            )
    with Observation(model, [probe], sequences=2).watching():
        model(torch.arange(24).reshape(3, 8) * 5 % 11)
    assert len(probe.read()) == len(outputs) == 2
    for name, output in outputs.items():
        expected = by_loop(output[:2].unflatten(-1, (2, 8)).transpose(1, 2))
        torch.testing.assert_close(probe.read()[f"diag/head_output/{name}"], expected, rtol=1e-4, atol=1e-5)


def test_torch_layers_a_single_position_and_a_new_step():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)
    probe = HeadOutput()
    observation = Observation(model, [probe])
    with observation.watching():
        model(torch.randn(2, 5, 16))
    assert [value.shape for value in probe.read().values()] == [(4,), (4,)]
    with observation.watching():
        model(torch.randn(2, 1, 16))
    assert not probe.read()
