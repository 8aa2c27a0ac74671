"""Positions by distance: against slow loops in float64 and against the models that they come from."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tameformer.nn.attention import AttentionCache, MultiHeadAttention
from tameformer.nn.positions import (
    AlibiPositions,
    BinaryPositions,
    BucketedPositions,
    DisentangledPositions,
    ShawPositions,
    alibi_slopes,
    binary_table,
    distances,
    log_buckets,
    t5_buckets,
)

HEADS, DIM = 4, 16
KINDS = {
    "alibi": lambda: AlibiPositions(HEADS),
    "t5": lambda: BucketedPositions(HEADS, num_buckets=8, max_distance=6),
    "shaw": lambda: ShawPositions(DIM // HEADS, max_distance=2),
    "disentangled": lambda: DisentangledPositions(HEADS, DIM // HEADS, max_distance=3),
}


def layer(kind, **more):
    torch.manual_seed(0)
    relative = KINDS[kind]()
    for parameter in relative.parameters():
        nn.init.normal_(parameter)
    return MultiHeadAttention(DIM, HEADS, relative=relative, **more).double()


def test_shaw_equals_the_papers_loop():
    attention = layer("shaw")
    relative, head_dim = attention.relative, DIM // HEADS
    x = torch.randn(1, 6, DIM, dtype=torch.float64)
    query, key, value = (
        linear(x)[0].unflatten(-1, (HEADS, -1)) for linear in (attention.query, attention.key, attention.value)
    )
    mixed = torch.zeros(6, HEADS, head_dim, dtype=torch.float64)
    for head in range(HEADS):
        for i in range(6):
            row = [max(-2, min(2, j - i)) + 2 for j in range(6)]
            logits = torch.stack(
                [query[i, head] @ (key[j, head] + relative.keys[row[j]]) / math.sqrt(head_dim) for j in range(6)]
            )
            weights = logits.softmax(0)
            mixed[i, head] = sum(weights[j] * (value[j, head] + relative.mixed[row[j]]) for j in range(6))
    expected = attention.out(mixed.flatten(1))
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_t5_bias_is_that_of_hugging_face():
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    configuration = modeling.T5Config(num_heads=HEADS, d_model=DIM, d_kv=4, relative_attention_num_buckets=32)
    theirs = modeling.T5Attention(configuration, has_relative_attention_bias=True)
    theirs.is_decoder = False
    ours = BucketedPositions(HEADS)
    with torch.no_grad():
        ours.table.copy_(theirs.relative_attention_bias.weight.T)
    query = torch.zeros(1, HEADS, 300, 4)
    torch.testing.assert_close(ours.bias(query, query, distances(300, 300)), theirs.compute_bias(300, 300))
    far = torch.arange(-3000, 3000)[None]
    for settings_ in ({}, {"num_buckets": 8, "max_distance": 20}):
        expected = modeling.T5Attention._relative_position_bucket(far, **settings_)
        assert t5_buckets(far, **settings_).equal(expected)


@pytest.mark.parametrize("position_buckets", [-1, 8])
def test_disentangled_is_that_of_hugging_face(position_buckets):
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    configuration = modeling.DebertaV2Config(
        hidden_size=DIM, num_attention_heads=HEADS, pos_att_type=["p2c", "c2p"], relative_attention=True,
        max_relative_positions=20, position_buckets=position_buckets,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = modeling.DisentangledSelfAttention(configuration).eval().double()
    span = 20 if position_buckets < 0 else position_buckets
    table = torch.randn(2 * span, DIM, dtype=torch.float64)
    buckets = None if position_buckets < 0 else partial(log_buckets, num_buckets=8, max_distance=20)
    relative = DisentangledPositions(HEADS, DIM // HEADS, max_distance=span, buckets=buckets)
    ours = MultiHeadAttention(DIM, HEADS, relative=relative).double()
    split = partial(torch.unflatten, dim=-1, sizes=(HEADS, -1))
    with torch.no_grad():
        relative.keys.copy_(split(theirs.pos_key_proj(table)).transpose(0, 1))
        relative.queries.copy_(split(theirs.pos_query_proj(table)).transpose(0, 1))
        for name in ("query", "key", "value"):
            getattr(ours, name).load_state_dict(getattr(theirs, f"{name}_proj").state_dict())
        ours.out.weight.copy_(torch.eye(DIM))
        ours.out.bias.zero_()
        x = torch.randn(2, 30, DIM, dtype=torch.float64)
        mask = torch.ones(2, 1, 30, 30, dtype=torch.bool)
        expected = theirs(x, mask, rel_embeddings=table)[0]
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=1e-7)  # theirs takes a root in float32


def test_alibi_slopes_are_the_papers():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    released = [2 ** (-8 * i / 8) for i in range(1, 9)] + [2 ** (-8 * i / 16) for i in (1, 3, 5, 7)]
    assert alibi_slopes(12).tolist() == pytest.approx(released)
    query = torch.zeros(1, 2, 3, 4)
    bias = AlibiPositions(2).bias(query, query, distances(3, 3))
    far = torch.tensor([[0.0, 1, 2], [1, 0, 1], [2, 1, 0]])
    torch.testing.assert_close(bias, -torch.stack([far / 16, far / 256])[None])


def test_binary_positions_are_binary_numbers():
    table = binary_table(100, 9)
    for position in (0, 1, 37, 99):
        assert "".join(str(int(bit)) for bit in reversed(table[position].tolist())) == f"{position:09b}"
    x = torch.randn(2, 5, 9)
    assert BinaryPositions(100, 9)(x, start=3).equal(x + table[3:8])
    assert binary_table(3, 70)[:, 2:].sum() == 0
    with pytest.raises(ValueError, match="dim of at least 7 for 100 binary positions, got 6"):
        binary_table(100, 6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=10)
@given(shift=st.integers(1, 50), length=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_only_the_distance_counts(kind, shift, length, seed):
    attention = layer(kind)
    x = torch.randn(2, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    here = torch.arange(length).expand(2, -1)
    torch.testing.assert_close(attention(x, positions=here + shift), attention(x), rtol=1e-12, atol=1e-12)
    order = torch.randperm(length)
    moved = attention(x[:, order], positions=here[:, order])  # tokens elsewhere, positions with them
    torch.testing.assert_close(moved, attention(x)[:, order], rtol=1e-12, atol=1e-12)
    if length > 2:
        swapped = torch.tensor([1, 0, *range(2, length)])
        assert not torch.allclose(attention(x[:, swapped]), attention(x)[:, swapped])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_a_cache_changes_nothing(kind, num_kv_heads):
    attention, cache = layer(kind, num_kv_heads=num_kv_heads), AttentionCache()
    x = torch.randn(2, 7, DIM, dtype=torch.float64)
    pieces = [attention(piece, is_causal=True, cache=cache) for piece in x.split([3, 1, 2, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(x, is_causal=True), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="got 1 for 8 keys; leave positions out where a cache is used"):
        attention(x[:, :1], cache=cache, positions=torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_and_gradients_arrive(kind):
    attention = layer(kind)
    x = torch.randn(2, 5, DIM, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, True, False, False])[None, None, None]
    out = attention(x, mask=mask)
    torch.testing.assert_close(out[:, :3], attention(x[:, :3]), rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in attention.relative.parameters())


def test_weights_are_dropped_in_training_also_where_they_are_written_out():
    attention, x = layer("shaw", dropout=0.5), torch.randn(1, 8, DIM, dtype=torch.float64)
    assert not attention(x).equal(attention(x))
    assert attention.eval()(x).equal(layer("shaw")(x))


def test_wrong_sizes():
    with pytest.raises(ValueError, match="multiple of 4, got 10"):
        BucketedPositions(2, num_buckets=10)
    with pytest.raises(ValueError, match="max_distance of at least 1, got 0"):
        ShawPositions(4, max_distance=0)
    with pytest.raises(
        ValueError, match="expected DotProductAttention or a score beside relative positions, got Identity"
    ):
        MultiHeadAttention(8, 2, relative=AlibiPositions(2), attend=nn.Identity())
