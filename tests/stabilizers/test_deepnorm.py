import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from transformers import BertConfig, BertModel

from tameformer.errors import PatchError
from tameformer.models import EncoderConfig, EncoderDecoderConfig, encoder, encoder_decoder
from tameformer.models.initialize import xavier_init
from tameformer.stabilizers.admin import admin
from tameformer.stabilizers.deepnorm import deepnorm, deepnorm_constants

TOKENS = torch.arange(1, 15).view(2, 7)


def ours(layers=3, **config):
    torch.manual_seed(0)
    small = {"dim": 16, "num_heads": 2, "residual": "post", "positions": "sinusoidal", **config}
    return encoder(EncoderConfig(num_layers=layers, **small), vocab_size=20, initialize=xavier_init)


def pair():
    torch.manual_seed(0)
    config = EncoderDecoderConfig(dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=3, residual="post")
    return encoder_decoder(config, vocab_size=20, padding_id=0)


def torch_stack(dim=16):
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(dim, 2, 2 * dim, 0.0, batch_first=True), 2)


def by_hand(model, tokens, alpha):
    x = model.positions(model.embedding(tokens), None)
    for layer in model.stack.layers:
        for part in (layer.attention, layer.feed_forward):
            x = part.norm(alpha * x + part.branch(x))
    return x


@given(n=st.integers(1, 1000), m=st.integers(1, 1000))
def test_the_constants_are_the_papers(n, m):
    assert deepnorm_constants(n)[0] == pytest.approx(((2 * n) ** 0.25, (8 * n) ** -0.25))
    (encoder_alpha, encoder_beta), (alpha, beta) = deepnorm_constants(n, m)
    assert encoder_alpha == pytest.approx(0.81 * n**0.25 * m**0.0625)
    assert encoder_alpha * encoder_beta == pytest.approx(0.81 * 0.87)
    assert (alpha, beta) == pytest.approx(((3 * m) ** 0.25, (12 * m) ** -0.25))


def test_the_published_table():
    table = {6: (1.418, 0.497, 2.060, 0.343), 18: (1.999, 0.353, 2.711, 0.261), 100: (3.416, 0.206, 4.162, 0.170)}
    for depth, row in table.items():
        assert [v for side in deepnorm_constants(depth, depth) for v in side] == pytest.approx(row, abs=1.5e-3)
    with pytest.raises(ValueError, match="expected at least 1 encoder layer and 0 decoder layers, got 0 and 3"):
        deepnorm_constants(0, 3)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_outputs_and_gradients_are_those_of_the_formula(norm):
    model, plain = ours(norm=norm).double(), ours(norm=norm).double()
    deepnorm(model)
    alpha, beta = deepnorm_constants(3)[0]
    for name, parameter in plain.named_parameters():
        if "layers" in name and name.endswith(("value.weight", "out.weight", "up.weight", "down.weight")):
            parameter.data.mul_(beta)
    expected, got = by_hand(plain, TOKENS, alpha), model(TOKENS)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    expected.pow(3).sum().backward()
    got.pow(3).sum().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        reference = gradients[name.replace("parametrizations.", "").replace(".original", "")]
        torch.testing.assert_close(parameter, reference)
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-9, atol=1e-9)


def test_each_side_has_its_own_constants():
    model, plain = pair(), pair()
    deepnorm(model)
    (_, small), (alpha, beta) = deepnorm_constants(2, 3)
    layer, before = model.decoder.layers[0].cross_attention.branch, plain.decoder.layers[0].cross_attention.branch
    torch.testing.assert_close(layer.value.weight, before.value.weight * beta)
    torch.testing.assert_close(layer.out.weight, before.out.weight * beta / alpha)
    assert torch.equal(layer.query.weight, before.query.weight)
    up = model.encoder.layers[1].feed_forward.branch.up.weight
    torch.testing.assert_close(up, plain.encoder.layers[1].feed_forward.branch.up.weight * small)


@pytest.mark.parametrize("start", ["scale", "xavier"])
def test_only_the_values_of_a_fused_projection_are_small(start):
    model, dim = torch_stack(64), 64
    beta = deepnorm_constants(2)[0][1]
    bias = model.layers[0].self_attn.in_proj_bias
    bias.data.fill_(0.5)
    before = model.layers[0].self_attn.in_proj_weight.clone()
    deepnorm(model, start=start)
    query, key, value = model.layers[0].self_attn.in_proj_weight.split(dim)
    assert float((value.std() / query.std()).detach()) == pytest.approx(beta, rel=0.05)
    assert float((key.std() / query.std()).detach()) == pytest.approx(1, rel=0.05)
    assert torch.equal(query, before[:dim]) == (start == "scale")
    if start == "xavier":
        assert float(query.std().detach()) == pytest.approx(dim**-0.5, rel=0.05)
        assert bias.abs().max() == 0


def test_removal_is_exact_after_each_start():
    for start in ("scale", "xavier", "keep"):
        model, plain = torch_stack().eval(), torch_stack()
        before, eps = [(n, id(p)) for n, p in model.named_parameters()], model.layers[0].norm1.eps
        with deepnorm(model, start=start):
            assert model.layers[0].norm1.eps < eps
        assert [(n, id(p)) for n, p in model.named_parameters()] == before
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {eps}
        assert not any("_started" in name for module in model.modules() for name in vars(module))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("build", [ours, pair, torch_stack])
def test_baking_copies_and_checkpoints(build):
    model, other = build().eval(), build().eval()
    inputs = (torch.randn(2, 7, 16),) if build is torch_stack else (TOKENS,) * (2 if build is pair else 1)
    keys = list(model.state_dict())
    handle = deepnorm(model)
    with torch.no_grad():
        expected = model(*inputs)
        deepnorm(other, **handle.settings)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(*inputs), expected)
        assert torch.equal(copy.deepcopy(model)(*inputs), expected)
        handle.bake()
        assert list(model.state_dict()) == keys
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-6, atol=2e-6)
        # A plain model differs by the epsilon of each stack's first norm only.
        fresh = build().eval()
        fresh.load_state_dict(load(save(model.state_dict())))
        torch.testing.assert_close(fresh(*inputs), expected, rtol=1e-3, atol=1e-3)
        for one, two in zip(fresh.modules(), model.modules(), strict=True):
            if isinstance(one, nn.LayerNorm):
                one.eps = two.eps
        torch.testing.assert_close(fresh(*inputs), expected, rtol=1e-6, atol=2e-6)


def test_a_model_whose_layers_share_weights_is_scaled_by_its_whole_depth():
    model = ours(1)
    model.stack.layers.append(model.stack.layers[0])
    plain = copy.deepcopy(model).double()
    handle = deepnorm(model.double(), start="keep")
    alpha = deepnorm_constants(2)[0][0]
    torch.testing.assert_close(model(TOKENS), by_hand(plain, TOKENS, alpha), rtol=1e-10, atol=1e-10)
    expected = model(TOKENS)
    handle.bake()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-10, atol=1e-10)


def test_a_deep_stack_keeps_the_size_of_its_stream():
    model = ours(24)
    deepnorm(model)
    assert float(model(TOKENS).std().detach()) == pytest.approx(1, abs=0.1)


def test_refusals():
    with pytest.raises(PatchError, match=r"deepnorm needs Post-norm layers, but stack.layers.0.attention is pre-norm"):
        deepnorm(ours(residual="pre"))
    model = ours()
    deepnorm(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for method in (deepnorm, admin):
        with pytest.raises(PatchError, match=r"the shortcut of stack.layers.0.attention is scaled already"):
            method(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9)
    config.is_decoder = config.add_cross_attention = True
    model = BertModel(config)
    with pytest.raises(PatchError, match=r"found the encoders \[\] and the decoders \['encoder.layer'\]"):
        deepnorm(model)
