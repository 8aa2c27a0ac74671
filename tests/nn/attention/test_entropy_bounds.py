import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.nn.attention.entropy import logits_entropy
from tameformer.nn.attention.entropy_bounds import centred_logit_norm, entropy_lower_bound, max_logit_bracket


def rows(kind, count, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(8, count, generator=generator, dtype=torch.float64)
    if kind == "sparse":
        noise = noise * (torch.rand(8, count, generator=generator) < 0.1)
    if kind == "heavy":
        noise = noise / torch.rand(8, count, generator=generator).clamp(min=1e-3)
    return scale * noise + 7.0


@given(
    kind=st.sampled_from(["gaussian", "sparse", "heavy"]),
    count=st.integers(1, 300),
    scale=st.floats(0.01, 50.0),
    seed=st.integers(0, 9999),
)
def test_no_row_falls_below_the_bound(kind, count, scale, seed):
    logits = rows(kind, count, scale, seed)
    tight = entropy_lower_bound(centred_logit_norm(logits), count)
    loose = entropy_lower_bound(torch.linalg.vector_norm(logits, dim=-1), count)
    entropy = logits_entropy(logits)
    assert (entropy >= tight - 1e-12).all()
    assert (tight >= loose - 1e-12).all()
    assert (loose >= 0).all()


@given(count=st.integers(2, 2000), norm=st.floats(0.0, 60.0))
def test_the_extremal_row_attains_the_bound(count, norm):
    row = torch.full((count,), -norm / math.sqrt(count * (count - 1)), dtype=torch.float64)
    row[0] = norm * math.sqrt((count - 1) / count)
    assert abs(logits_entropy(row) - entropy_lower_bound(norm, count)) <= 1e-12
    assert centred_logit_norm(row).item() == pytest.approx(norm, rel=1e-12, abs=1e-12)


def test_the_bound_of_the_paper_from_spectral_norms_holds_and_is_looser():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    for scale in (0.01, 0.05, 0.2):
        product = scale * torch.randn(12, 12, generator=generator, dtype=torch.float64)
        logits = tokens @ product @ tokens.mT
        norms = torch.linalg.matrix_norm(product, 2) * torch.linalg.matrix_norm(tokens @ tokens.mT, 2)
        paper, tight = entropy_lower_bound(norms, 20), entropy_lower_bound(centred_logit_norm(logits), 20)
        assert (paper <= tight).all()
        assert (tight <= logits_entropy(logits)).all()


def test_the_values_of_the_formula():
    for norm in (0.1, 1.0, 5.0, 10.0, 20.0):
        beta = math.exp(-norm * math.sqrt(197 / 196))
        expected = math.log(1 + 196 * beta) + norm * math.sqrt(197 * 196) * beta / (1 + 196 * beta)
        assert entropy_lower_bound(norm, 197).item() == pytest.approx(expected, rel=1e-12)


def test_ends_of_the_range():
    norms = torch.tensor([0.0, 1e-30, 1e3, 1e6, 1e38, math.inf])
    bound = entropy_lower_bound(norms, 64)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound[:2], torch.full((2,), math.log(64)))
    assert (bound[2:] == 0).all()
    assert (entropy_lower_bound(norms, 1) == 0).all()
    assert entropy_lower_bound(torch.tensor([math.nan, -1.0]), 64).isnan().all()
    keys = torch.tensor([0, 1, 2])
    assert entropy_lower_bound(torch.tensor([3.0, 3.0, 0.0]), keys).isnan().tolist() == [True, False, False]
    assert entropy_lower_bound(torch.tensor(0.0), keys)[1:].tolist() == pytest.approx([0.0, math.log(2)])


def test_the_bound_falls_with_the_norm():
    bound = entropy_lower_bound(torch.linspace(0, 100, 1000, dtype=torch.float64), 50)
    assert (bound.diff() < 0).all()


def test_the_centred_norm_looks_at_visible_keys_only():
    logits = torch.tensor([[1.0, 5.0, math.nan], [2.0, 2.0, -math.inf], [1.0, math.inf, 3.0]])
    visible = torch.tensor([[True, True, False], [True, True, False], [False, False, False]])
    norm = centred_logit_norm(logits, visible)
    assert norm[:2].tolist() == pytest.approx([math.sqrt(8), 0.0])
    assert norm[2].isnan()
    assert centred_logit_norm(logits)[0].isnan()
    assert centred_logit_norm(logits.bfloat16(), visible).dtype == torch.float32


@given(count=st.integers(1, 50), scale=st.floats(0.0, 100.0), seed=st.integers(0, 999))
def test_the_bracket_holds_the_largest_logit(count, scale, seed):
    logits = rows("gaussian", count, scale, seed)
    low, high = max_logit_bracket(logits.logsumexp(-1), count)
    largest = logits.amax(-1)
    assert (low <= largest + 1e-12).all()
    assert (largest <= high + 1e-12).all()
    torch.testing.assert_close(high - low, torch.full((8,), math.log(count), dtype=torch.float64))


def test_both_ends_of_the_bracket_are_reached():
    low, _ = max_logit_bracket(torch.zeros(9, dtype=torch.float64).logsumexp(0), 9)
    assert low.item() == pytest.approx(0.0, abs=1e-14)
    _, high = max_logit_bracket(torch.tensor([90.0, 0.0]).logsumexp(0), 2)
    assert high == 90.0


def test_the_bracket_of_no_key_is_nan():
    low, high = max_logit_bracket(torch.tensor([0.0, math.nan, 1.0]), torch.tensor([0, 4, 4]))
    assert low.isnan().tolist() == high.isnan().tolist() == [True, True, False]
