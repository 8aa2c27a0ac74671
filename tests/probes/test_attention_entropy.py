import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.models.decoder import DecoderConfig, decoder
from tameformer.nn.attention.entropy import logits_entropy, stratified_rows
from tameformer.probes import AttentionEntropy
from tameformer.probes.attention_entropy import sampled_entropy


def entropy_by_loop(logits, visible):
    rows = []
    for row, seen in zip(logits.double(), visible, strict=True):
        weights = row[seen].softmax(0)
        rows.append(-(weights * weights.clamp(min=1e-300).log()).sum())
    return torch.stack(rows)


@given(scale=st.floats(0.01, 400), seed=st.integers(0, 1000))
def test_entropy_agrees_with_a_float64_loop_and_is_never_negative(scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(5, 12, generator=generator)
    visible = torch.rand(5, 12, generator=generator) < 0.7
    visible[:, 0] = True
    entropy = logits_entropy(logits, visible)
    torch.testing.assert_close(entropy.double(), entropy_by_loop(logits, visible), rtol=0, atol=5e-5)
    assert (entropy >= 0).all()
    assert (entropy <= visible.sum(-1).log() + 1e-5).all()


def test_entropy_of_no_key_is_nan_and_of_one_key_is_zero():
    visible = torch.tensor([[False, False], [True, False]])
    entropy = logits_entropy(torch.tensor([[1.0, 2.0], [50.0, 1.0]]), visible)
    assert entropy[0].isnan()
    assert entropy[1] == 0.0


@given(length=st.integers(1, 300), count=st.integers(1, 64))
def test_rows_are_distinct_inside_and_spread(length, count):
    rows = stratified_rows(length, count)
    assert len(rows) == min(length, count) == len(set(rows.tolist()))
    assert rows.min() >= 0
    assert rows.max() < length
    gaps = rows.diff()
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "grouped"])
def test_all_rows_give_the_exact_mean(kind):
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2 if kind == "grouped" else 4, 9, 8)
    mask = torch.rand(2, 1, 9, 9) < 0.6 if kind == "mask" else None
    if mask is not None:
        mask[0, 0, 3] = False  # a row that sees nothing does not count
        mask[..., 0] |= torch.arange(9) != 3
    entropy, ceiling = sampled_entropy(query, key, mask=mask, is_causal=kind == "causal", scale=None, rows=9)
    keys = key.repeat_interleave(4 // key.shape[1], dim=1)
    logits = query[0] @ keys[0].transpose(-1, -2) / math.sqrt(8)
    visible = torch.ones(9, 9, dtype=torch.bool).tril() if kind == "causal" else torch.ones(9, 9, dtype=torch.bool)
    visible = mask[0, 0] if mask is not None else visible
    counted = visible.any(-1)
    for head in range(4):
        expected = entropy_by_loop(logits[head][counted], visible[counted]).mean()
        assert float(entropy[head]) == pytest.approx(float(expected), abs=1e-5)
    assert float(ceiling) == pytest.approx(float(visible[counted].sum(-1).double().log().mean()), abs=1e-6)


def test_watching_leaves_nothing_and_changes_nothing():
    model = decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, max_length=8), vocab_size=11)
    tokens = torch.arange(8)[None]
    before = model(tokens)
    probe = AttentionEntropy(model)
    with probe.watching():
        watched = model(tokens)
    assert torch.equal(before, watched)
    values = probe.read()
    assert sum(key.startswith("diag/attention_entropy/") for key in values) == 2
    assert all(len(value) == 2 for key, value in values.items() if "_max" not in key)
    with pytest.raises(RuntimeError, match="on purpose"), probe.watching():
        raise RuntimeError("on purpose")
    assert not any(module._forward_pre_hooks for module in model.modules())
