import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, T5Config, T5Model

from tameformer.errors import PatchError
from tameformer.models import DecoderConfig, EncoderConfig, decoder, encoder
from tameformer.nn.attention import DotProductAttention
from tameformer.optim import decay_groups
from tameformer.patch import named
from tameformer.stabilizers.peri_norm import peri_norm
from tameformer.stabilizers.qk_norm import normalize_heads, qk_norm

TOKENS = torch.arange(14).view(2, 7)
HF = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
HF |= {"intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 32, "use_cache": False}


def model(**more):
    torch.manual_seed(0)
    return encoder(EncoderConfig(dim=16, num_heads=2, num_layers=2, **more), vocab_size=20)


def torch_stack(batch_first=True, norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first and not norm_first)


def move(parameters):
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_patched_llama_is_qwen3_by_name_and_function(attention):
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**HF, attn_implementation=attention))
    handle = qk_norm(llama)
    move(handle.new_parameters)
    qwen = Qwen3ForCausalLM(Qwen3Config(**HF, attention_bias=False, tie_word_embeddings=False))
    qwen.load_state_dict(llama.state_dict())
    torch.testing.assert_close(llama(TOKENS).logits, qwen(TOKENS).logits, rtol=1e-5, atol=1e-6)
    grouped = llama.generate(TOKENS, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    assert torch.equal(
        grouped, qwen.generate(TOKENS, max_new_tokens=5, do_sample=False, use_cache=True, pad_token_id=0)
    )


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_each_head_is_normalized_before_positions_turn_it(norm):
    torch.manual_seed(0)
    config = DecoderConfig(dim=16, num_heads=4, num_kv_heads=2, num_layers=1, positions="rotary")
    built = decoder(config, vocab_size=20)
    handle = qk_norm(built, norm=norm)
    move(handle.new_parameters)
    attention, seen = built.stack.layers[0].attention.branch, {}
    attention.query.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    attention.attend.register_forward_pre_hook(lambda module, args: seen.update(query=args[0], key=args[1]))
    built(TOKENS)
    for name, heads in (("query", 4), ("key", 2)):
        layer, own = getattr(attention, name), attention.get_submodule(f"{name[0]}_norm")
        x = (seen["x"].double() @ layer.weight.double().T + layer.bias.double()).view(2, 7, heads, 4)
        if norm == "layer_norm":
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + (1e-5 if norm == "layer_norm" else 1e-6)).sqrt() * own.weight
        x = x + own.bias if norm == "layer_norm" else x
        expected = attention.positions(x.float().transpose(1, 2), None, start=0)
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-5)
    assert len(handle.new_parameters) == (4 if norm == "layer_norm" else 2)


@pytest.mark.parametrize("scale", [0.1, 1, 1e5])
def test_no_logit_exceeds_the_root_of_the_width(scale):
    """Equal query and key reach it; the projections' size does not matter."""
    built, largest = model(), []
    qk_norm(built)
    attention = built.stack.layers[0].attention.branch
    with torch.no_grad():
        attention.query.weight.mul_(scale)
        attention.key.weight.copy_(attention.query.weight)
    attend = next(module for module in attention.modules() if isinstance(module, DotProductAttention))
    attend.register_forward_pre_hook(
        lambda module, args: largest.append((args[0] @ args[1].transpose(-2, -1) * 8**-0.5).max())
    )
    built(TOKENS)
    assert largest[0] <= 8**0.5 * (1 + 1e-6)
    assert largest[0] > 8**0.5 * (0.99 if scale < 1 else 0.9999)


def test_where_dot_products_have_no_scale_the_weights_make_up_for_it():
    config = T5Config(vocab_size=20, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32)
    t5 = qk_norm(T5Model(config))
    assert len(t5.names) == 3
    assert torch.cat([*t5.new_parameters]).unique().tolist() == pytest.approx([8**-0.25])
    assert torch.cat([*qk_norm(model()).new_parameters]).unique().tolist() == [1.0]


def test_the_weights_learn_and_reach_the_optimizer_once_and_undecayed():
    built = torch_stack()
    handle = qk_norm(built)
    groups = decay_groups(built, weight_decay=0.1)
    undecayed = [id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0]
    assert all(undecayed.count(id(p)) == 1 for p in handle.new_parameters)
    move(handle.new_parameters)
    built(torch.randn(2, 7, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in handle.new_parameters)


def test_autocast_leaves_the_norm_in_float32():
    """In bf16 the mean square alone would be off by 1e-3."""
    norm, x = nn.RMSNorm(64, eps=1e-6), torch.randn(5, 128, dtype=torch.bfloat16)
    norm.weight.data.uniform_(0.5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = normalize_heads(norm, x, 64)
    heads = x.double().view(5, 2, 64)
    expected = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert torch.equal(found, expected.view(5, 128).bfloat16())


@pytest.mark.parametrize("build", [model, torch_stack, lambda: torch_stack(False), lambda: torch_stack(True, True)])
def test_removal_copies_and_checkpoints(build):
    built, other = build(), build()
    inputs = TOKENS if hasattr(built, "stack") else torch.randn(2, 7, 16)
    before, output = [(n, id(p)) for n, p in built.named_parameters()], built(inputs)
    attributes = {name: set(vars(module)) for name, module in built.named_modules()}
    handle = qk_norm(built)
    move(handle.new_parameters)
    qk_norm(other, **handle.settings)
    other.load_state_dict(built.state_dict())
    patched, twin = built(inputs), copy.deepcopy(built)
    assert (patched - output).abs().max() > 1e-3
    assert torch.equal(other(inputs), patched)
    with pytest.raises(PatchError, match="qk_norm cannot be folded"):
        handle.bake()
    handle.remove()
    assert [(n, id(p)) for n, p in built.named_parameters()] == before
    assert {name: set(vars(module)) for name, module in built.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.modules())
    assert torch.equal(built(inputs), output)
    for name, parameter in twin.named_parameters():
        if name.endswith("q_norm.weight"):
            parameter.data.zero_()
    assert torch.equal(built(inputs), output)
    assert (twin(inputs) - patched).abs().max() > 1e-3


def test_nested_tensors_come_back_with_the_last_of_two_patches():
    built = torch_stack()
    assert built.use_nested_tensor
    first, second = qk_norm(built, where=named("layers.0.*")), qk_norm(built, where=named("layers.1.*"))
    padding = torch.arange(7) >= torch.tensor([[5], [7]])
    first.remove()
    with torch.no_grad():
        built.eval()(torch.randn(2, 7, 16), src_key_padding_mask=padding)
    assert not built.use_nested_tensor
    second.remove()
    assert built.use_nested_tensor


def test_refusals():
    built = model()
    keys = list(built.state_dict())
    handle = qk_norm(built, where=named("*.1.*"))
    assert handle.names == ("stack.layers.1.attention.branch",)
    with pytest.raises(PatchError, match=r"stack.layers.1.attention.branch normalizes its queries or keys already"):
        qk_norm(built)
    handle.remove()
    assert list(built.state_dict()) == keys
    with pytest.raises(PatchError, match=r"layers.0.self_attn normalizes its queries"):
        qk_norm(Qwen3ForCausalLM(Qwen3Config(**HF)).model)
    with pytest.raises(PatchError, match=r"where= takes no attention; there are stack.layers.0.attention.branch, "):
        qk_norm(built, where=named("nothing"))
    with pytest.raises(PatchError, match="there is no norm rms for queries and keys; did you mean rms_norm"):
        qk_norm(built, norm="rms")
    with pytest.raises(PatchError, match="looked for residual branches"):
        qk_norm(nn.Linear(2, 2))


def test_nothing_is_left_where_one_attention_cannot_be_opened():
    built = torch_stack()
    built.layers[1].self_attn = nn.MultiheadAttention(16, 2, add_zero_attn=True, batch_first=True)
    attributes = {name: set(vars(module)) for name, module in built.named_modules()}
    with pytest.raises(PatchError, match=r"layers.1.self_attn adds keys of its own"):
        qk_norm(built)
    assert {name: set(vars(module)) for name, module in built.named_modules()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in built.modules())


def test_it_stands_beside_peri_norm():
    built = torch_stack(norm_first=True)
    handles = [peri_norm(built), qk_norm(built)]
    x = torch.randn(2, 7, 16)
    patched = built(x)
    with torch.no_grad():
        torch.testing.assert_close(built.eval()(x), patched)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in built.modules())


def test_a_distributed_model_is_refused():
    wrapped = object.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model()
    with pytest.raises(PatchError, match="wrapped in DistributedDataParallel"):
        qk_norm(wrapped)
