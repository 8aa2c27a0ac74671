import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5EncoderModel

from tameformer.errors import PatchError
from tameformer.models import DecoderConfig, EncoderConfig, decoder, encoder
from tameformer.patch import Observation, Observer, named
from tameformer.patch.attend import attention_by_logits
from tameformer.stabilizers.qk_norm import qk_norm
from tameformer.stabilizers.soft_cap import soft_cap, soft_capped

TOKENS = torch.arange(14).view(2, 7)
HF = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
HF |= {"intermediate_size": 32, "use_cache": False}


def model(**more):
    torch.manual_seed(0)
    built = encoder(EncoderConfig(dim=16, num_heads=2, num_layers=2, **more), vocab_size=20)
    for parameter in built.parameters():
        parameter.data.mul_(3)  # logits of some size
    return built


def torch_stack():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    built = nn.TransformerEncoder(layer, 2)
    for parameter in built.parameters():
        parameter.data.mul_(3)
    return built


def heads():
    torch.manual_seed(1)
    return [10 * torch.randn(2, 4, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


class Calls(Observer):
    def __init__(self):
        self.seen = []

    def on_attention(self, call):
        self.seen.append(call)


def calls_of(built, **inputs):
    calls = Calls()
    with Observation(built, [calls], sequences=None).watching():
        built(**inputs)
    return calls.seen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_it_is_what_flex_attention_gives():
    query, key, value = (part.detach() for part in heads())
    causal = torch.ones(5, 5, dtype=torch.bool).tril()

    def score(score, batch, head, row, column):
        return torch.where(row >= column, 5.0 * torch.tanh(score / 5.0), -torch.inf)

    expected = flex_attention(query, key, value, score_mod=score)
    for given in ({"is_causal": True}, {"mask": causal}):
        found = attention_by_logits(query, key, value, transform=lambda x: soft_capped(x, 5.0), **given)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients():
    inputs = [part.detach()[:1, :1, :3].mul(0.1).requires_grad_() for part in heads()]
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    mask[1] = False
    assert torch.autograd.gradcheck(
        lambda *x: attention_by_logits(*x, mask=mask, transform=lambda y: soft_capped(y, 2.0))[0], inputs
    )


@pytest.mark.parametrize("build", [model, torch_stack, lambda: LlamaForCausalLM(LlamaConfig(**HF))])
def test_logits_stay_within_the_cap_and_masked_keys_masked(build):
    built = build().eval()
    real = torch.arange(7) < torch.tensor([[5], [7]])
    inputs = {"tokens": TOKENS, "real": real}
    if isinstance(built, nn.TransformerEncoder):
        inputs = {"src": 5 * torch.randn(2, 7, 16), "src_key_padding_mask": ~real}
    elif isinstance(built, LlamaForCausalLM):
        inputs = {"input_ids": TOKENS, "attention_mask": real.long()}
        for parameter in built.parameters():
            parameter.data.mul_(3 if parameter.dim() < 2 else 20)
    soft_cap(built, cap=2.0)
    calls = calls_of(built, **inputs)
    assert len(calls) == 2
    for call in calls:
        visible = real[:, None, None, :].expand(call.logits.shape)
        visible = visible.tril() if isinstance(built, LlamaForCausalLM) else visible
        assert 1 < call.logits[visible].abs().max() <= 2.0
        assert (call.logits.softmax(-1)[~visible] == 0).all()


@pytest.mark.parametrize("build", [model, torch_stack])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_it_acts_in_every_mode_and_a_large_cap_changes_nothing(build, mode):
    built, inputs = build().train(mode == "train"), TOKENS
    if isinstance(built, nn.TransformerEncoder):
        inputs = torch.randn(2, 7, 16)
    with torch.set_grad_enabled(mode != "no_grad"):
        plain = built(inputs)
        with soft_cap(built, cap=1e9):
            torch.testing.assert_close(built(inputs), plain, rtol=1e-5, atol=1e-5)
        with soft_cap(built, cap=0.5):
            assert (built(inputs) - plain).abs().max() > 1e-2
        assert torch.equal(built(inputs), plain)


def test_grouped_heads_rotary_positions_and_generation():
    torch.manual_seed(0)
    config = DecoderConfig(dim=16, num_heads=4, num_kv_heads=2, num_layers=1, positions="rotary")
    built = decoder(config, vocab_size=20)
    for parameter in built.parameters():
        parameter.data.mul_(2)
    attention, seen = built.stack.layers[0].attention.branch, {}
    attention.attend.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(args=args, kwargs=kwargs, output=output), with_kwargs=True
    )
    soft_cap(built, cap=1.0)
    built(TOKENS)
    query, key, value = (part.double() for part in seen["args"])
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    logits = torch.tanh(query @ key.transpose(-2, -1) / 2).masked_fill(
        ~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf
    )
    assert seen["kwargs"]["is_causal"]
    torch.testing.assert_close(seen["output"].double(), logits.softmax(-1) @ value, rtol=1e-5, atol=1e-5)


def test_a_bias_of_positions_is_not_capped():
    torch.manual_seed(0)
    config = {"vocab_size": 20, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 32}
    built = T5EncoderModel(T5Config(**config)).eval()
    attention = built.encoder.block[0].layer[0].SelfAttention
    attention.relative_attention_bias.weight.data.mul_(100)
    bias = attention.compute_bias(7, 7)
    soft_cap(built, cap=1e-6)
    logits = calls_of(built, input_ids=TOKENS)[0].logits
    torch.testing.assert_close(logits, bias.expand_as(logits), rtol=0, atol=1e-4)
    assert bias.abs().max() > 10


def test_the_weights_that_are_returned_are_the_capped_ones():
    built = torch_stack()
    x = 5 * torch.randn(2, 7, 16)
    attention = built.layers[0].self_attn
    soft_cap(built, cap=0.1)
    output, weights = attention(x, x, x, average_attn_weights=False)
    assert weights.max() < 1 / 7 * torch.tensor(0.2).exp()
    torch.testing.assert_close(attention(x, x, x, need_weights=False)[0], output)


def test_eager_attention_is_refused_before_or_in_the_first_pass():
    built = LlamaForCausalLM(LlamaConfig(**HF, attn_implementation="eager"))
    attributes = {name: set(vars(module)) for name, module in built.named_modules()}
    remedy = r"model\.set_attn_implementation\('sdpa'\)"
    with pytest.raises(PatchError, match=f"model.layers.0.self_attn is on eager.*{remedy}"):
        soft_cap(built)
    assert {name: set(vars(module)) for name, module in built.named_modules()} == attributes
    built.set_attn_implementation("sdpa")
    soft_cap(built)
    built(TOKENS)
    built.set_attn_implementation("eager")
    with pytest.raises(PatchError, match=f"model.layers.0.self_attn was to call.*{remedy}"):
        built(TOKENS)


def test_removal_copies_and_settings():
    built, other = model(), model()
    before, plain = {name: set(vars(m)) for name, m in built.named_modules()}, built(TOKENS)
    keys = list(built.state_dict())
    handle = soft_cap(built, cap=0.5)
    soft_cap(other, **handle.settings)
    capped, twin = built(TOKENS), copy.deepcopy(built)
    assert list(built.state_dict()) == keys
    assert torch.equal(other(TOKENS), capped)
    with pytest.raises(PatchError, match="soft_cap cannot be folded"):
        handle.bake()
    handle.remove()
    assert {name: set(vars(m)) for name, m in built.named_modules()} == before
    assert torch.equal(built(TOKENS), plain)
    assert torch.equal(twin(TOKENS), capped)


def test_refusals():
    built = model()
    handle = soft_cap(built, where=named("*.1.*"))
    assert handle.names == ("stack.layers.1.attention.branch",)
    with pytest.raises(PatchError, match=r"soft_cap is on stack.layers.1.attention.branch already"):
        soft_cap(built)
    assert "forward" not in vars(built.stack.layers[0].attention.branch)
    assert vars(built.stack.layers[1].attention.branch)["forward"].transform is not None
    for cap in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a finite cap above 0"):
            soft_cap(model(), cap=cap)


def test_it_stands_beside_normalized_queries_and_is_removed_in_any_order():
    x = torch.randn(2, 7, 16)
    for first in (0, 1):
        built = torch_stack()
        plain = built(x)
        handles = [qk_norm(built), soft_cap(built, cap=0.1)]
        both = built(x)
        handles.pop(first).remove()
        assert not torch.equal(built(x), both)
        assert not torch.equal(built(x), plain)
        handles[0].remove()
        assert torch.equal(built(x), plain)


def test_dropout_is_that_of_the_call():
    built = model(attention_dropout=0.5)
    soft_cap(built)
    torch.manual_seed(0)
    first, second = built(TOKENS), built(TOKENS)
    assert not torch.equal(first, second)
    built.eval()
    assert torch.equal(built(TOKENS), built(TOKENS))


def test_autocast():
    built = model()
    soft_cap(built, cap=5.0)
    with torch.no_grad():
        exact = built(TOKENS)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = built(TOKENS)
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_the_output_of_queries_without_a_key_is_zero():
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    output = attention_by_logits(x, x, x, mask=mask, transform=lambda y: soft_capped(y, 2.0))[0]
    expected = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
    assert (output[:, :, 1] == 0).all()
    torch.testing.assert_close(output[:, :, 2], expected[:, :, 2])
    output.sum().backward()
    assert x.grad.isfinite().all()
