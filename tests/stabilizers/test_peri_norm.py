import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from tameformer.errors import PatchError
from tameformer.models import EncoderConfig, encoder
from tameformer.stabilizers.peri_norm import peri_norm

TOKENS = torch.arange(14).view(2, 7)


def model(residual="pre", norm="layer_norm"):
    torch.manual_seed(0)
    config = EncoderConfig(dim=16, num_heads=2, num_layers=2, residual=residual, norm=norm)
    return encoder(config, vocab_size=20)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_it_is_our_peri_norm_model(norm):
    patched, reference = model("pre", norm), model("peri", norm)
    handle = peri_norm(patched)
    for name, parameter in reference.named_parameters():
        source = name.replace("attention.out_norm", "attention.branch.out.out_norm")
        source = source.replace("feed_forward.out_norm", "feed_forward.branch.down.out_norm")
        parameter.data.copy_(patched.get_parameter(source))
    torch.testing.assert_close(patched(TOKENS), reference(TOKENS), rtol=0, atol=0)
    patched(TOKENS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.new_parameters)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_layers_where_attention_returns_a_tuple(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first, norm_first=True)
    x = torch.randn(2, 7, 16)
    attention, feed_forward = copy.deepcopy(layer), copy.deepcopy(layer)
    stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    peri_norm(stack)
    unit = nn.LayerNorm(16)
    y = x + unit(attention._sa_block(attention.norm1(x), None, None))
    y = y + unit(feed_forward._ff_block(feed_forward.norm2(y)))
    for no_grad in (False, True):
        with torch.set_grad_enabled(not no_grad):
            torch.testing.assert_close(stack(x), y)


def test_the_new_norm_is_of_the_models_own_kind():
    config = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    built = LlamaModel(LlamaConfig(**config, intermediate_size=32, num_key_value_heads=1))
    built.layers[0].input_layernorm.weight.data.fill_(3.0)
    handle = peri_norm(built)
    assert type(built.layers[0].self_attn.o_proj.out_norm).__name__ == "LlamaRMSNorm"
    assert all(bool((p == 1).all()) for p in handle.new_parameters)


def test_removal_copies_and_checkpoints():
    built = model()
    before, output = [(n, id(p)) for n, p in built.named_parameters()], built(TOKENS)
    handle = peri_norm(built)
    for parameter in handle.new_parameters:
        parameter.data.add_(0.5)
    patched, twin, other = built(TOKENS), copy.deepcopy(built), model()
    peri_norm(other, **handle.settings)
    other.load_state_dict(built.state_dict())
    assert torch.equal(twin(TOKENS), patched)
    assert torch.equal(other(TOKENS), patched)
    with pytest.raises(PatchError, match="peri_norm cannot be folded"):
        handle.bake()
    handle.remove()
    assert [(n, id(p)) for n, p in built.named_parameters()] == before
    assert torch.equal(built(TOKENS), output)
    assert not any(module._forward_hooks for module in built.modules())
    assert torch.equal(twin(TOKENS), patched)


def test_refusals():
    with pytest.raises(PatchError, match=r"stack.layers.0.attention is post-norm"):
        peri_norm(model("post"))
    built = model()
    peri_norm(built)
    names = list(built.state_dict())
    with pytest.raises(PatchError, match=r"peri_norm is on stack.layers.0.attention already"):
        peri_norm(built)
    assert list(built.state_dict()) == names
