import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tameformer.nn.z_loss import log_partition_penalty


def noise(*shape, seed=0, dtype=torch.float64):
    return 3 * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_hand(logits, labels, coefficient, vocab_size, weight, reduction):
    """Token by token, number by number."""
    total, counted = 0.0, 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        if label != -100:
            count = 1.0 if weight is None else float(weight[label])
            total += count * coefficient * math.log(sum(math.exp(value) for value in row[:vocab_size])) ** 2
            counted += count
    return total if reduction == "sum" else total / counted


@given(
    seed=st.integers(0, 1000),
    vocab_size=st.sampled_from([None, 5, 8]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
)
def test_it_is_the_sum_written_out(seed, vocab_size, weighted, reduction):
    logits, labels = noise(6, 8, seed=seed), torch.tensor([0, -100, 4, 4, 1, -100])
    weight = torch.linspace(0.2, 3, 8, dtype=torch.float64) if weighted else None
    found = log_partition_penalty(
        logits, labels, coefficient=0.3, vocab_size=vocab_size, weight=weight, reduction=reduction
    )
    assert float(found) == pytest.approx(by_hand(logits, labels, 0.3, vocab_size, weight, reduction), rel=1e-12)


def test_the_gradient_is_two_coefficients_times_ln_z_times_the_probability():
    logits = noise(4, 7).requires_grad_()
    log_partition_penalty(logits, coefficient=0.25, reduction="sum").backward()
    expected = 2 * 0.25 * torch.logsumexp(logits, -1, keepdim=True) * logits.softmax(-1)
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-13, atol=1e-15)
    assert torch.autograd.gradcheck(lambda x: log_partition_penalty(x, coefficient=0.25), [logits])


def test_padded_columns_get_no_gradient():
    logits = noise(4, 8).requires_grad_()
    log_partition_penalty(logits, vocab_size=5).backward()
    assert bool((logits.grad[:, 5:] == 0).all())
    assert bool((logits.grad[:, :5] != 0).all())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_has_the_divisor_and_mask_of_the_cross_entropy(reduction, weighted):
    """Where every ln Z is 1 the term is the coefficient, counted as torch counts a loss that is 1 everywhere."""
    labels = torch.tensor([3, -100, 0, 6])
    weight = torch.linspace(0.5, 2, 8, dtype=torch.float64) if weighted else None
    flat = torch.full((4, 8), 1 - math.log(8), dtype=torch.float64)
    found = log_partition_penalty(flat, labels, coefficient=1.0, weight=weight, reduction=reduction)
    entropy = F.cross_entropy(flat, labels, weight=weight, reduction=reduction)  # ln 8 at every token
    torch.testing.assert_close(found, entropy / math.log(8))


def test_probabilities_count_every_row():
    logits, labels = noise(3, 5), noise(3, 5, seed=1).softmax(-1)
    assert log_partition_penalty(logits, labels) == log_partition_penalty(logits)


def test_half_precision_is_summed_in_float32():
    logits = noise(4, 4096, dtype=torch.float32).to(torch.bfloat16)
    found = log_partition_penalty(logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, log_partition_penalty(logits.double()).float(), rtol=1e-6, atol=0)
