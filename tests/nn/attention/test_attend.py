"""Attention with any score: against a slow loop, and the identities that hold for all of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tameformer.nn.attention import (
    AdditiveScore,
    DotProductAttention,
    GaussianScore,
    GeneralScore,
    MultiHeadAttention,
    ScoreAttention,
    attend,
    attention_weights,
    concat_score,
    dot,
    scaled_dot,
)
from tameformer.nn.masks import causal_mask
from tameformer.patch import Observation, Observer
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.probes.head_output import HeadOutput

HEADS, DIM = 2, 4
SCORES = {
    "dot": lambda: dot,
    "scaled_dot": lambda: scaled_dot,
    "general": lambda: GeneralScore(HEADS, DIM).double(),
    "additive": lambda: AdditiveScore(HEADS, DIM, hidden_dim=5).double(),
    "concat": lambda: concat_score(HEADS, DIM).double(),
    "gaussian": lambda: GaussianScore(bandwidth=1.5),
    "anyones": lambda: lambda query, key: -torch.cdist(query, key, p=1),
}


def pair_score(name, score, head, query, key):
    """The paper's formula for one query and one key."""
    if name == "general":
        return query @ score.weight[head] @ key
    if name == "additive":
        return score.vector[head] @ torch.tanh(query @ score.query_weight[head] + key @ score.key_weight[head])
    if name == "concat":
        weight = torch.cat([score.query_weight[head], score.key_weight[head]])
        return score.vector[head] @ F.leaky_relu(torch.cat([query, key]) @ weight, 0.2)
    return {
        "dot": lambda: query @ key,
        "scaled_dot": lambda: query @ key / math.sqrt(DIM),
        "gaussian": lambda: torch.log(torch.exp(-(query - key).square().sum() / (2 * 1.5**2))),
        "anyones": lambda: -(query - key).abs().sum(),
    }[name]()


def slow(name, score, query, key, value, mask):
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    for b, h, q in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        seen = mask[b, h, q].nonzero()[:, 0].tolist()
        if seen:
            logits = torch.stack([pair_score(name, score, h, query[b, h, q], key[b, h, k]) for k in seen])
            out[b, h, q] = logits.softmax(0) @ value[b, h, seen]
    return out


def drawn(queries, keys, seed, *, value_dim=3):
    generator = torch.Generator().manual_seed(seed)
    sizes = (queries, DIM), (keys, DIM), (keys, value_dim)
    return [torch.randn(2, HEADS, *size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=5)
@given(queries=st.integers(1, 3), keys=st.integers(1, 4), density=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_equals_a_slow_loop(name, queries, keys, density, seed):
    torch.manual_seed(seed)
    score, (query, key, value) = SCORES[name](), drawn(queries, keys, seed)
    mask = torch.rand(2, HEADS, queries, keys) < density  # some queries see nothing
    expected = slow(name, score, query, key, value, mask)
    torch.testing.assert_close(attend(query, key, value, score=score, mask=mask), expected, rtol=1e-11, atol=1e-11)
    weights = attention_weights(query, key, score=score, mask=mask)
    torch.testing.assert_close(weights @ value, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=10)
@given(queries=st.integers(1, 4), keys=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_is_a_convex_combination_and_a_set_operation(name, queries, keys, seed):
    torch.manual_seed(seed)
    score, (query, key, value) = SCORES[name](), drawn(queries, keys, seed)
    out = attend(query, key, value, score=score)
    weights = attention_weights(query, key, score=score)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, queries, dtype=torch.float64))
    assert (out <= value.amax(-2, keepdim=True) + 1e-12).all()
    assert (out >= value.amin(-2, keepdim=True) - 1e-12).all()
    order, shuffled = torch.randperm(queries), torch.randperm(keys)
    moved = attend(query[:, :, order], key[:, :, shuffled], value[:, :, shuffled], score=score)
    torch.testing.assert_close(moved, out[:, :, order], rtol=1e-11, atol=1e-11)


@settings(max_examples=20)
@given(dim=st.integers(1, 8), norm=st.floats(0.1, 4), seed=st.integers(0, 2**31))
def test_softmax_attention_is_gaussian_kernel_regression_at_one_key_norm(dim, norm, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 3, 5, dim, generator=generator, dtype=torch.float64)
    value = torch.randn(3, 5, 2, generator=generator, dtype=torch.float64)
    key = norm * F.normalize(key, dim=-1)
    kernel = torch.exp(-(query[:, :, None] - key[:, None]).square().sum(-1) / (2 * dim**0.5))
    expected = (kernel / kernel.sum(-1, keepdim=True)) @ value
    torch.testing.assert_close(attend(query, key, value), expected, rtol=1e-11, atol=1e-11)
    same = attend(query, key, value, score=GaussianScore(bandwidth=dim**0.25))
    torch.testing.assert_close(same, expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=20)
@given(dim=st.integers(2, 512), seed=st.integers(0, 2**31))
def test_scaling_keeps_the_variance_at_one(dim, seed):
    query, key = torch.randn(2, 500, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Five standard deviations of the variance over 500 by 500 pairs, whose queries and keys come again and again.
    near = 3 * 2 * (2 / (500 * dim)) ** 0.5 + 0.02
    assert scaled_dot(query, key).var().item() == pytest.approx(1, rel=near)
    assert dot(query, key).var().item() == pytest.approx(dim, rel=near)


@pytest.mark.parametrize("dim", [4, 64, 1024])
def test_a_fresh_matrix_between_them_keeps_it_too(dim):
    query, key = torch.randn(2, 500, dim, generator=torch.Generator().manual_seed(dim))
    torch.manual_seed(0)
    assert GeneralScore(1, dim)(query, key).var().item() == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize("name", SCORES)
def test_causal_is_the_causal_mask_and_biases_are_added(name):
    torch.manual_seed(0)
    score, (query, key, value) = SCORES[name](), drawn(5, 5, 0)
    bias = torch.randn(1, HEADS, 5, 5, dtype=torch.float64)
    mask = causal_mask(5, 5)
    causal = attend(query, key, value, score=score, is_causal=True)
    torch.testing.assert_close(causal, attend(query, key, value, score=score, mask=mask), rtol=1e-11, atol=1e-11)
    expected = (score(query, key) + bias).masked_fill(~mask, -torch.inf).softmax(-1) @ value
    for masks in ({"mask": mask}, {"is_causal": True}):
        got = attend(query, key, value, score=score, bias=bias, **masks)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["scaled_dot", "gaussian", "additive"])
def test_a_query_that_sees_nothing_has_zeros_and_finite_gradients(name):
    torch.manual_seed(0)
    score, inputs = SCORES[name](), [tensor.requires_grad_() for tensor in drawn(3, 4, 0)]
    mask = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    mask[0, 0, 1] = False
    bias = torch.randn(1, HEADS, 3, 4, dtype=torch.float64)
    out = attend(*inputs, score=score, mask=mask, bias=bias)
    assert not out[0, :, 1].any()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)


@pytest.mark.parametrize("name", ["additive", "general", "gaussian", "anyones"])
def test_without_heads_and_with_shared_ones(name):
    torch.manual_seed(0)
    score = {"additive": AdditiveScore(1, DIM).double(), "general": GeneralScore(1, DIM).double()}.get(
        name, SCORES[name]()
    )
    query, key, value = drawn(3, 5, 1)
    shared = attend(query, key[:, :1], value[:, :1], score=score)
    for head in range(HEADS):
        alone = attend(query[:, head], key[:, 0], value[:, 0], score=score)
        torch.testing.assert_close(shared[:, head], alone, rtol=1e-11, atol=1e-11)
        single = attend(query[0, head], key[0, 0], value[0, 0], score=score)
        torch.testing.assert_close(single, alone[0], rtol=1e-11, atol=1e-11)


def test_gradients_reach_queries_keys_values_and_weights():
    for name in ("general", "additive", "concat"):
        torch.manual_seed(0)
        score, inputs = SCORES[name](), drawn(2, 3, 0)
        parameters = [*inputs, *score.parameters()]
        for tensor in parameters:
            tensor.requires_grad_()
        bias = torch.randn(1, HEADS, 2, 3, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda *_, s=score, b=bias, i=inputs: attend(*i, score=s, bias=b), parameters)


def test_multi_head_with_a_score_is_multi_head_with_that_score():
    torch.manual_seed(0)
    plain, scored = MultiHeadAttention(8, 2), MultiHeadAttention(8, 2, score=scaled_dot)
    scored.load_state_dict(plain.state_dict())
    x, memory = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(scored(x, is_causal=True), plain(x, is_causal=True))
    torch.testing.assert_close(scored(x, memory), plain(x, memory))
    with pytest.raises(ValueError, match="expected score or attend, got both"):
        MultiHeadAttention(8, 2, score=dot, attend=DotProductAttention())


def test_dropout_acts_in_training_only():
    query, key, value = drawn(6, 6, 0)
    for score in (scaled_dot, AdditiveScore(2, 4).double()):
        module = ScoreAttention(score, dropout=0.5)
        plain = module.eval()(query, key, value)
        assert plain.equal(attend(query, key, value, score=score))
        assert not module.train()(query, key, value).equal(plain)


def test_a_mask_beside_is_causal_is_refused():
    query = torch.randn(2, 3)
    with pytest.raises(ValueError, match="expected either mask or is_causal=True, got both"):
        attend(query, query, query, mask=torch.ones(2, 2, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match=r"expected a bandwidth above 0, got 0\.0"):
        GaussianScore(bandwidth=0.0)


class Attended(Observer):
    def __init__(self):
        self.calls = []

    def on_attention(self, call):
        self.calls.append(call)


@pytest.mark.parametrize("name", ["dot", "general", "gaussian", "additive", "concat"])
def test_probes_see_every_score(name):
    torch.manual_seed(0)
    score = {"dot": dot, "gaussian": GaussianScore()}.get(name) or {
        "general": GeneralScore,
        "additive": AdditiveScore,
        "concat": concat_score,
    }[name](2, 4)
    model = torch.nn.ModuleList([MultiHeadAttention(8, 2, score=score)])
    model.forward = lambda x: model[0](x)
    entropy, heads, calls = AttentionEntropy(), HeadOutput(), Attended()
    observation = Observation(model, [entropy, heads, calls], sequences=None)
    x = torch.randn(2, 5, 8)
    with observation.watching(), torch.no_grad():
        model(x)
    assert observation.unseen() == []
    assert len(calls.calls) == 1
    (found,) = (value for key, value in entropy.read().items() if key.startswith("diag/attention_entropy/"))
    split = [linear(x).unflatten(-1, (2, 4)).transpose(1, 2) for linear in (model[0].query, model[0].key)]
    weights = attention_weights(*split, score=score).double()
    expected = torch.special.entr(weights).sum(-1).mean((0, 2))
    torch.testing.assert_close(found.double().flatten(), expected, rtol=1e-3, atol=1e-3)
    assert any(key.startswith("diag/head_output/") for key in heads.read())
