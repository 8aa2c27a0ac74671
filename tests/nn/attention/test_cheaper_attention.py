"""Attention that is cheaper than all pairs: equal to a masked or written-out form of itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tameformer.nn.attention import (
    AttentionCache,
    CollaborativeAttention,
    LinearAttention,
    MultiHeadAttention,
    ScoreAttention,
    WindowedAttention,
    attend,
    dot,
    elu_plus_one,
    window_mask,
)
from tameformer.nn.masks import document_mask
from tameformer.nn.positions import RotaryPositions
from tameformer.patch import Observation
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.probes.head_output import HeadOutput, head_output

MASKS = ["none", "causal", "padding", "pairs"]


def drawn(length, seed, kv_heads=2):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 2, length, 4, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, length, 4, generator=generator, dtype=torch.float64)
    return query, key, value


def masks_of(kind, length):
    """What the module is given, and the pairs that it means."""
    everything = torch.ones(2, 1, length, length, dtype=torch.bool)
    if kind == "causal":
        return {"is_causal": True}, everything.tril()
    if kind == "padding":
        real = torch.arange(length) < torch.tensor([[length], [max(1, length // 2)]])
        return {"mask": real[:, None, None]}, everything & real[:, None, None]
    if kind == "pairs":
        mask = document_mask(torch.arange(length).expand(2, -1) // 3)
        return {"mask": mask}, mask
    return {}, everything


@pytest.mark.parametrize("kind", MASKS)
@settings(max_examples=12)
@given(
    length=st.integers(1, 20), radius=st.integers(1, 5), kv_heads=st.sampled_from([1, 2]), seed=st.integers(0, 2**31)
)
def test_windowed_is_all_pairs_with_a_mask(kind, length, radius, kv_heads, seed):
    query, key, value = drawn(length, seed, kv_heads)
    given_, pairs = masks_of(kind, length)
    distance = (torch.arange(length) - torch.arange(length)[:, None]).abs()
    expected = attend(query, key, value, mask=pairs & (distance <= radius))
    got = WindowedAttention(radius)(query, key, value, **given_)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MASKS)
@settings(max_examples=8)
@given(length=st.sampled_from([1, 2, 63, 64, 65, 150]), kv_heads=st.sampled_from([1, 2]), seed=st.integers(0, 2**31))
def test_linear_is_its_weights_written_out(kind, length, kv_heads, seed):
    query, key, value = drawn(length, seed, kv_heads)
    given_, pairs = masks_of(kind, length)
    features = nn.functional.elu(query) + 1, nn.functional.elu(key.repeat_interleave(2 // kv_heads, 1)) + 1
    weights = (features[0] @ features[1].mT) * pairs
    expected = weights / weights.sum(-1, keepdim=True) @ value.repeat_interleave(2 // kv_heads, 1)
    torch.testing.assert_close(LinearAttention()(query, key, value, **given_), expected, rtol=1e-11, atol=1e-11)


def test_linear_attention_is_attention_with_the_logarithm_of_the_kernel_as_score():
    query, key, value = drawn(9, 0)
    expected = attend(query, key, value, score=lambda q, k: dot(elu_plus_one(q), elu_plus_one(k)).log())
    torch.testing.assert_close(LinearAttention()(query, key, value), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [lambda: WindowedAttention(2), LinearAttention], ids=["windowed", "linear"])
def test_layers_with_a_cache_and_gradients(make):
    torch.manual_seed(0)
    layer = MultiHeadAttention(8, 2, attend=make(), positions=RotaryPositions(99, 4)).double()
    cache, x = AttentionCache(), torch.randn(2, 80, 8, dtype=torch.float64, requires_grad=True)
    whole = layer(x, is_causal=True)
    pieces = [layer(piece, is_causal=True, cache=cache) for piece in x.split([70, 1, 6, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-11, atol=1e-11)
    whole.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in layer.named_parameters() if n != "key.bias")
    seen = torch.autograd.grad(layer(x, is_causal=True)[0, 40].sum(), x)[0][0].any(-1).nonzero().flatten().tolist()
    assert seen == list(range(41) if isinstance(layer.attend, LinearAttention) else range(38, 41))


def test_a_window_that_holds_padding_only_gives_zeros():
    query, key, value = (tensor.requires_grad_() for tensor in drawn(12, 0))
    mask = (torch.arange(12) < 3)[None, None, None]
    out = WindowedAttention(2)(query, key, value, mask=mask)
    assert not out[:, :, 5:].any()
    assert out[:, :, :5].any(-1).all()
    out.sum().backward()
    assert query.grad.isfinite().all()
    out = LinearAttention()(query, key, value, mask=torch.zeros(1, 1, 1, 12, dtype=torch.bool))
    assert not out.any()


def test_linear_attention_sums_in_float32_under_autocast():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 1, 2000, 4)
    expected = LinearAttention()(query, key, value + 5, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = LinearAttention()(query, key, value + 5, is_causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def watched(attend_):
    torch.manual_seed(0)
    model = nn.Sequential(MultiHeadAttention(8, 2, attend=attend_))
    probe, heads = AttentionEntropy(), HeadOutput()
    observation = Observation(model, [probe, heads], sequences=None)
    x = torch.randn(2, 11, 8)
    with observation.watching(), torch.no_grad():
        out = model(x)
    assert out.equal(model(x))  # watching changes nothing
    split = [linear(x).unflatten(-1, (2, 4)).transpose(1, 2) for linear in (model[0].query, model[0].key)]
    return {**probe.read(), **heads.read()}, observation.unseen(), split, x


def test_probes_see_windows_and_name_what_has_no_softmax():
    values, unseen, (query, key), x = watched(WindowedAttention(2))
    assert unseen == []
    weights = ScoreAttention(dot).weights(query / 2, key, mask=window_mask(11, 11, 2))
    expected = torch.special.entr(weights).sum(-1).mean((0, 2))
    torch.testing.assert_close(values["diag/attention_entropy/0"], expected, rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    value = MultiHeadAttention(8, 2).value(x).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(values["diag/head_output/0"], head_output((weights @ value).detach()))
    values, unseen, *_ = watched(LinearAttention())
    assert not values
    assert unseen == ["0"]


@pytest.mark.parametrize("memory_dim", [None, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_collaborative_heads_take_ordinary_ones_over_exactly(memory_dim, bias):
    torch.manual_seed(0)
    heads = MultiHeadAttention(8, 2, memory_dim=memory_dim, bias=bias).double()
    for parameter in heads.parameters():
        nn.init.normal_(parameter)
    ours = CollaborativeAttention.from_heads(heads)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    memory = None if memory_dim is None else torch.randn(2, 5, memory_dim, dtype=torch.float64)
    mask = (torch.arange(5) < 4)[None, None, None]
    for masks in ({}, {"mask": mask}, {"is_causal": True}):
        torch.testing.assert_close(ours(x, memory, **masks), heads(x, memory, **masks), rtol=1e-10, atol=1e-10)


def test_collaborative_heads_equal_the_papers_formula_and_learn():
    torch.manual_seed(0)
    layer = CollaborativeAttention(8, 2, shared_dim=3).double()
    nn.init.normal_(layer.mixing)
    nn.init.normal_(layer.content_bias)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    query, key = layer.shared_query.weight, layer.shared_key.weight
    mixed = []
    for head in range(2):
        logits = x[0] @ query.T @ torch.diag(layer.mixing[head]) @ key @ x[0].T + x[0] @ layer.content_bias[head]
        mixed.append((logits / 2).softmax(-1) @ layer.value(x[0])[:, 4 * head : 4 * head + 4])
    torch.testing.assert_close(layer(x)[0], layer.out(torch.cat(mixed, -1)), rtol=1e-11, atol=1e-11)
    layer(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    with pytest.raises(ValueError, match="1 key-value heads for 2 heads"):
        CollaborativeAttention.from_heads(MultiHeadAttention(8, 2, num_kv_heads=1))


def test_wrong_settings():
    with pytest.raises(ValueError, match="radius of at least 1, got 0"):
        WindowedAttention(0)
    query = torch.randn(1, 1, 4, 2)
    for module in (WindowedAttention(1), LinearAttention()):
        with pytest.raises(ValueError, match="expected either mask or is_causal=True, got both"):
            module(query, query, query, mask=torch.ones(1, 1, 4, 4, dtype=torch.bool), is_causal=True)
