import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model

from tameformer.errors import PatchError
from tameformer.patch.parametrized import parametrize
from tameformer.stabilizers.depth_scaled_init import depth_scaled_init


def model(layers=3):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def outputs(built):
    return [weight for layer in built.layers for weight in (layer.self_attn.out_proj.weight, layer.linear2.weight)]


@pytest.mark.parametrize(("by", "depths"), [("stack", [6] * 6), ("layer", [2, 2, 4, 4, 6, 6])])
def test_the_last_weights_are_divided_by_the_root_of_depth(by, depths):
    built, plain = model(), model()
    depth_scaled_init(built, by=by)
    for scaled, weight, depth in zip(outputs(built), outputs(plain), depths, strict=True):
        torch.testing.assert_close(scaled, weight / depth**0.5)
    assert torch.equal(built.layers[0].linear1.weight, plain.layers[0].linear1.weight)
    assert torch.equal(built.layers[0].linear2.bias, plain.layers[0].linear2.bias)


def test_transposed_weights_and_their_number():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    built = GPT2Model(config)
    before = built.h[1].mlp.c_proj.weight.clone()
    assert depth_scaled_init(built).names == ("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj")
    torch.testing.assert_close(built.h[1].mlp.c_proj.weight, before / 2)


def test_removal_is_exact_until_somebody_trains():
    built, plain = model(), model()
    objects = [id(p) for p in built.parameters()]
    depth_scaled_init(built).remove()
    assert [id(p) for p in built.parameters()] == objects
    assert all(torch.equal(a, b) for a, b in zip(built.parameters(), plain.parameters(), strict=True))
    handle = depth_scaled_init(built)
    trained = built.layers[0].linear2.weight
    trained.data.add_(1.0)
    expected = trained.clone()
    handle.remove()
    assert torch.equal(trained, expected)
    assert torch.equal(built.layers[1].linear2.weight, plain.layers[1].linear2.weight)
    assert not any("_started" in name for module in built.modules() for name in vars(module))


def test_a_tied_weight_is_scaled_once():
    built, plain = model(2), model(2)
    built.layers[1].linear2.weight = built.layers[0].linear2.weight
    depth_scaled_init(built)
    torch.testing.assert_close(built.layers[1].linear2.weight, plain.layers[0].linear2.weight / 2)


def test_baking_keeps_the_values():
    built = model()
    x = torch.randn(2, 5, 8)
    handle = depth_scaled_init(built)
    expected = built(x)
    handle.bake()
    assert torch.equal(built(x), expected)
    assert list(built.state_dict()) == list(model().state_dict())


def test_refusals():
    built = model()
    depth_scaled_init(built)
    with pytest.raises(PatchError, match="depth_scaled_init has written weights of"):
        depth_scaled_init(built)
    built = model()
    parametrize(built.layers[0].linear2, "weight", nn.Tanh())
    with pytest.raises(PatchError, match=r"layers.0.linear2.weight is computed by another patch"):
        depth_scaled_init(built)
