import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tameformer.nn.attention import AttentionCache, DotProductAttention, MultiHeadAttention, StackCache
from tameformer.nn.masks import causal_mask


def slow_attention(query, key, value, mask, scale):
    """One query at a time, over the keys it may see."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    group = query.shape[1] // key.shape[1]
    for b, h, q in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        seen = mask[b, h, q].nonzero()[:, 0]
        if len(seen):
            logits = key[b, h // group, seen] @ query[b, h, q] * scale
            out[b, h, q] = logits.softmax(0) @ value[b, h // group, seen]
    return out


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 6)),
    density=st.floats(0, 1),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 2**31),
)
def test_equals_a_slow_loop(heads, lengths, density, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_kv_heads), (queries, keys) = heads, lengths
    query = torch.randn(2, num_heads, queries, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, num_kv_heads, keys, 8, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, queries, keys, generator=generator) < density  # some queries see nothing
    got = DotProductAttention(scale=scale)(query, key, value, mask=mask)
    expected = slow_attention(
        query, key, value, mask.expand(-1, num_heads, -1, -1), 1 / math.sqrt(8) if scale is None else scale
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_is_causal_is_the_causal_mask():
    query, key, value = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    attend = DotProductAttention()
    expected = attend(query, key, value, mask=causal_mask(6, 6))
    torch.testing.assert_close(attend(query, key, value, is_causal=True), expected, rtol=1e-12, atol=1e-12)


def test_mask_beside_is_causal_is_refused():
    query = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match="expected either mask or is_causal=True, got both"):
        DotProductAttention()(query, query, query, mask=causal_mask(2, 2), is_causal=True)


def test_dropout_in_training_only():
    attend, query = DotProductAttention(dropout=0.5), torch.randn(1, 2, 8, 4)
    plain = DotProductAttention()(query, query, query)
    assert not attend(query, query, query).equal(plain)
    assert attend.eval()(query, query, query).equal(plain)


def test_a_pre_hook_sees_everything():
    layer, seen = MultiHeadAttention(16, 4, num_kv_heads=2), []
    layer.attend.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    x, mask = torch.randn(2, 5, 16), causal_mask(5, 5)
    layer(x, mask=mask)
    (((query, key, value), kwargs),) = seen
    assert (query.shape, key.shape, value.shape) == ((2, 4, 5, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    assert kwargs["mask"] is mask
    assert kwargs["is_causal"] is False


@pytest.mark.parametrize("memory_dim", [None, 10])
def test_multi_head_equals_torch(memory_dim):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(16, 4, kdim=memory_dim, vdim=memory_dim, batch_first=True, dtype=torch.float64)
    ours = MultiHeadAttention(16, 4, memory_dim=memory_dim).double()
    if memory_dim is None:
        weights = theirs.in_proj_weight.chunk(3)
    else:
        weights = (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight)
    nn.init.normal_(theirs.in_proj_bias)
    biases = theirs.in_proj_bias.chunk(3)
    for linear, weight, bias in zip((ours.query, ours.key, ours.value), weights, biases, strict=True):
        linear.load_state_dict({"weight": weight, "bias": bias})
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    memory = torch.randn(2, 7, 16 if memory_dim is None else memory_dim, dtype=torch.float64)
    real = torch.rand(2, 7) < 0.7
    real[:, 0] = True
    expected, _ = theirs(x, memory, memory, key_padding_mask=~real)
    torch.testing.assert_close(ours(x, memory, mask=real[:, None, None]), expected, rtol=1e-12, atol=1e-12)


def test_permuting_keys_and_values_together_changes_nothing():
    layer = MultiHeadAttention(16, 4).double()
    x, memory = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 7, 16, dtype=torch.float64)
    shuffled = memory[:, torch.randperm(7)]
    torch.testing.assert_close(layer(x, memory), layer(x, shuffled), rtol=1e-12, atol=1e-12)


def test_shared_heads_equal_repeated_ones():
    shared, full = MultiHeadAttention(16, 4, num_kv_heads=2).double(), MultiHeadAttention(16, 4).double()
    full.query.load_state_dict(shared.query.state_dict())
    full.out.load_state_dict(shared.out.state_dict())
    for name in ("key", "value"):
        for kind, tensor in getattr(shared, name).state_dict().items():
            heads = (
                tensor.view(2, 4, -1).repeat_interleave(2, dim=0).reshape(getattr(full, name).state_dict()[kind].shape)
            )
            getattr(full, name).state_dict()[kind].copy_(heads)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    torch.testing.assert_close(shared(x, is_causal=True), full(x, is_causal=True), rtol=1e-12, atol=1e-12)


def test_cache_grows_and_keeps_what_it_holds():
    cache, pieces = AttentionCache(), [torch.randn(2, 3, size, 4) for size in (1, 1, 3, 1, 7)]
    for count, piece in enumerate(pieces, start=1):
        key, value = cache.append(piece, -piece)
        assert key.equal(torch.cat(pieces[:count], dim=2))
        assert value.equal(-key)
    assert cache.length == 13
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.read()[0].equal(torch.cat(pieces, dim=2)[[1, 1, 0]])


def test_an_empty_cache_cannot_be_read():
    with pytest.raises(ValueError, match="got an empty one; call append first"):
        AttentionCache().read()


def test_selecting_rows_of_one_source_leaves_the_memory_alone():
    cache, rows = StackCache(1), torch.arange(2.0)[:, None, None, None]
    cache.own[0].append(rows, rows)
    cache.memory[0].append(rows, rows)
    cache.select(torch.tensor([1, 0]), same_memory=True)
    assert cache.own[0].read()[0].flatten().tolist() == [1, 0]
    assert cache.memory[0].read()[0].flatten().tolist() == [0, 1]
    cache.select(torch.tensor([1]))
    assert cache.own[0].read()[0].flatten().tolist() == [0]
    assert cache.memory[0].read()[0].flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"dim": 10, "num_heads": 4},
            r"expected num_heads that divides dim, got num_heads=4 and dim=10; .*\[1, 2, 5, 10\]",
        ),
        (
            {"dim": 8, "num_heads": 4, "num_kv_heads": 3},
            r"got num_kv_heads=3 and num_heads=4; choose one of \[1, 2, 4\]",
        ),
        ({"dim": 8, "num_heads": 2, "dropout": 0.1, "attend": DotProductAttention()}, "expected dropout=0 .* got 0.1"),
    ],
)
def test_wrong_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**settings)
