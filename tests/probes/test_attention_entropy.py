import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.models.decoder import DecoderConfig, decoder
from tameformer.nn.attention.entropy import logits_entropy, stratified_rows
from tameformer.nn.attention.entropy_bounds import entropy_lower_bound
from tameformer.patch import AttentionCall, Observation
from tameformer.probes import AttentionEntropy
from tameformer.probes.attention_entropy import row_logits, row_statistics


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


KINDS = ["plain", "causal", "padding", "mask per head", "additive", "bias", "grouped", "scale", "logits"]


def call_of(kind, dtype=torch.float32, spread=1.0, batch=3, length=9):
    """A call of attention, its logits in float64 and the keys that each query sees, both (batch, heads, query, key)."""
    generator = torch.Generator().manual_seed(0)
    query = (spread * torch.randn(batch, 4, length, 8, generator=generator)).to(dtype)
    key = torch.randn(batch, 2 if kind == "grouped" else 4, length, 8, generator=generator).to(dtype)
    mask, visible = None, torch.ones(batch, 4, length, length, dtype=torch.bool)
    scale = 0.7 if kind == "scale" else 8**-0.5
    logits = query.double() @ key.double().repeat_interleave(4 // key.shape[1], 1).mT * scale
    if kind == "causal":
        visible = visible.tril()
    elif kind == "padding":
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        mask[0, ..., 6:] = mask[2, ..., 4:] = False
        visible = visible & mask
    elif kind == "mask per head":
        mask = torch.rand(batch, 4, length, length, generator=generator) < 0.5
        mask |= torch.eye(length, dtype=torch.bool)
        visible = mask
    elif kind == "additive":
        visible = visible.tril()
        mask = torch.zeros(1, 1, length, length, dtype=dtype).masked_fill(~visible[:1, :1], -torch.inf)
    elif kind == "bias":
        mask = torch.randn(1, 4, length, length, generator=generator).to(dtype)
        logits = logits + mask.double()
    if kind == "logits":
        seen = logits.to(dtype).masked_fill(~visible.tril(), torch.finfo(dtype).min)
        return AttentionCall("layer", logits=seen), seen.double(), visible.tril()
    given_scale = scale if kind == "scale" else None
    call = AttentionCall("layer", query, key, None, mask=mask, is_causal=kind == "causal", scale=given_scale)
    return call, logits, visible


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 40.0])
@pytest.mark.parametrize("kind", KINDS)
def test_all_rows_give_the_exact_statistics(kind, spread, dtype):
    call, logits, visible = call_of(kind, dtype, spread)
    rows, seen, counted = row_logits(call, rows=9)
    measured = row_statistics(
        rows[None], None if seen is None else seen[None], None if counted is None else counted[None]
    )
    real = visible.diagonal(dim1=-2, dim2=-1)  # padding does not see itself
    assert real.all() == (kind != "padding")
    for head in range(4):
        of_head = [
            entropy_by_loop(logits[b, head][real[b, head]], visible[b, head][real[b, head]]) for b in range(len(logits))
        ]
        entropies = torch.cat(of_head)
        hidden = logits[:, head].masked_fill(~visible[:, head], -torch.inf)[real[:, head]]
        assert measured["attention_entropy"][0, head].item() == pytest.approx(entropies.mean().item(), abs=2e-5)
        assert measured["attention_entropy_min"][0, head].item() == pytest.approx(entropies.min().item(), abs=5e-5)
        assert measured["attention_logit_max"][0, head].item() == pytest.approx(hidden.max().item(), rel=1e-5)
        centred = [row[row > -torch.inf] - row[row > -torch.inf].mean() for row in hidden]
        bounds = [entropy_lower_bound(row.norm().reshape(()), len(row)) for row in centred]
        expected = torch.stack(bounds).mean().item()
        assert measured["attention_entropy_bound"][0, head].item() == pytest.approx(expected, abs=1e-4)
    sizes = visible.sum(-1)[real]
    assert measured["attention_entropy_max"].item() == pytest.approx(sizes.double().log().mean().item(), abs=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_sample_of_rows_is_a_part_of_all(batch):
    call, logits, _ = call_of("plain", batch=batch, length=40)
    rows, *_ = row_logits(call, rows=5)
    assert rows.shape == (batch, 4, 5, 40)
    distances = (rows[:, :, :, None] - logits[:, :, None].float()).abs().amax(-1)
    assert distances.amin(-1).max() < 1e-5
    if batch > 1:  # each sequence has its own rows
        assert not torch.equal(distances[0, 0].argmin(-1), distances[1, 0].argmin(-1))


def test_the_standard_error_is_of_the_size_of_the_error():
    torch.manual_seed(0)
    errors, estimates = [], []
    for _ in range(40):
        query, key = torch.randn(1, 4, 256, 16), torch.randn(1, 4, 256, 16)
        call = AttentionCall("layer", query, key, None, is_causal=True)
        exact = row_statistics(*[None if x is None else x[None] for x in row_logits(call, 256)])["attention_entropy"]
        sampled = row_statistics(*[None if x is None else x[None] for x in row_logits(call, 32)])
        errors.append(sampled["attention_entropy"] - exact)
        estimates.append(sampled["attention_entropy_error"])
    error, estimate = torch.cat(errors).square().mean().sqrt(), torch.cat(estimates).square().mean().sqrt()
    assert 0.6 < estimate / error < 2.5


def test_no_real_query_gives_nan_and_not_a_number_that_looks_healthy():
    call = AttentionCall(
        "layer", torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), None, mask=torch.zeros(1, 1, 1, 3, dtype=torch.bool)
    )
    measured = row_statistics(*[None if x is None else x[None] for x in row_logits(call, 3)])
    assert all(value.isnan().all() for name, value in measured.items() if name != "attention_entropy_error")


def test_a_nan_in_one_head_stays_in_that_head():
    query = torch.randn(1, 2, 5, 4)
    query[0, 1, 2, 0] = torch.nan
    call = AttentionCall("layer", query, torch.randn(1, 2, 5, 4))
    rows, *_ = row_logits(call, 5)
    entropy = row_statistics(rows[None])["attention_entropy"][0]
    assert entropy[0].isfinite()
    assert entropy[1].isnan()


def test_layers_of_different_shapes_are_read_in_the_order_of_the_model():
    probe = AttentionEntropy(rows=4)
    probe.on_begin()
    for name, length in (("a", 6), ("b", 8), ("c", 6)):
        probe.on_attention(AttentionCall(name, torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)))
    keys = list(probe.read())
    assert [key for key in keys if key.startswith("diag/attention_entropy/")] == [
        f"diag/attention_entropy/{name}" for name in "abc"
    ]
    assert keys[0].endswith("/a")
    assert keys[-1].endswith("/c")


def test_watching_leaves_nothing_and_changes_nothing():
    model = decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, max_length=8), vocab_size=11)
    tokens = torch.arange(8)[None]
    before = model(tokens)
    probe = AttentionEntropy()
    observation = Observation(model, [probe])
    with observation.watching():
        watched = model(tokens)
    assert torch.equal(before, watched)
    values = probe.read()
    assert sum(key.startswith("diag/attention_entropy/") for key in values) == 2
    summary = probe.summary(
        {f"{key}/{head}": float(v) for key, vs in values.items() if vs.dim() for head, v in enumerate(vs)}
    )
    heads = torch.cat([value for key, value in values.items() if key.startswith("diag/attention_entropy/")])
    assert summary == {"train/attention_entropy": pytest.approx(heads.mean().item())}
