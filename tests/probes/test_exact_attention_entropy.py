import pytest
import torch
from torch import nn

from tameformer.patch import AttentionCall
from tameformer.probes import Watch
from tameformer.probes.attention_entropy import row_logits, row_statistics
from tameformer.probes.exact_attention_entropy import ExactAttentionEntropy, all_entropies


def both(call):
    rows, visible, _ = row_logits(call, rows=10**6)
    by_rows = row_statistics(rows[None], None if visible is None else visible[None])
    probe = ExactAttentionEntropy()
    probe.on_begin()
    probe.on_attention(call)
    return by_rows, probe.read()


@pytest.mark.parametrize("kind", ["plain", "causal", "padding", "logits"])
def test_it_agrees_with_all_rows(kind):
    torch.manual_seed(0)
    query, key = 2 * torch.randn(3, 4, 12, 8), torch.randn(3, 2, 12, 8)
    mask = None
    if kind == "padding":
        mask = torch.ones(3, 1, 1, 12, dtype=torch.bool)
        mask[1, ..., 7:] = False
    call = AttentionCall("layer", query, key, mask=mask, is_causal=kind == "causal")
    if kind == "logits":
        logits = query @ key.repeat_interleave(2, 1).mT
        call = AttentionCall("layer", logits=logits.masked_fill(torch.rand(3, 1, 12, 12) < 0.3, torch.finfo().min))
    by_rows, exact = both(call)
    assert torch.allclose(exact["diag/attention_entropy/layer"], by_rows["attention_entropy"][0], atol=1e-5)
    assert torch.allclose(exact["diag/attention_entropy_min/layer"], by_rows["attention_entropy_min"][0], atol=1e-5)


def test_hidden_queries_do_not_count_and_broken_ones_do():
    query = torch.randn(1, 2, 4, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 3, :] = False
    _, healthy = both(AttentionCall("layer", query, query, mask=mask))
    assert healthy["diag/attention_entropy/layer"].isfinite().all()
    broken = query.clone()
    broken[0, 1, 0, 0] = torch.nan
    probe = ExactAttentionEntropy()
    probe.on_attention(AttentionCall("layer", broken, query, mask=mask))
    entropy = probe.read()["diag/attention_entropy/layer"]
    assert entropy[0].isfinite()
    assert entropy[1].isnan()
    assert all_entropies(AttentionCall("layer", query, query, mask=mask))[..., 3].isnan().all()


def test_it_sees_every_sequence_of_a_model():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    probe = ExactAttentionEntropy()
    watch = Watch(model, [(probe, 1)], sequences=None)
    with watch.watching(1):
        _, weights = model(x, x, x, average_attn_weights=False)
    expected = torch.special.entr(weights.detach()).sum(-1).mean((0, 2))
    assert torch.allclose(watch.read()["diag/attention_entropy/"], expected, atol=1e-6)
