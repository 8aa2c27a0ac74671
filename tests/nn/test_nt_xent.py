import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.nn.nt_xent import nt_xent


def views(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, dim, dtype=torch.float64, generator=generator).unbind()


def by_the_formula(first, second, temperature):
    """Equation 1 of the paper, pair by pair."""
    rows = [row / row.norm() for row in (*first, *second)]
    count, total = len(first), 0.0
    for i in range(2 * count):
        other = (i + count) % (2 * count)
        exponentials = [math.exp(float(rows[i] @ rows[k]) / temperature) for k in range(2 * count) if k != i]
        total -= math.log(math.exp(float(rows[i] @ rows[other]) / temperature) / sum(exponentials))
    return total / 2


@given(st.integers(1, 6), st.sampled_from([0.1, 0.5, 2.0]), st.integers(0, 100))
def test_it_is_equation_1(count, temperature, seed):
    first, second = views(count, 5, seed)
    expected = by_the_formula(first, second, temperature)
    assert nt_xent(first, second, temperature=temperature).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # Only directions count, and the order of images does not.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    assert nt_xent(3 * first[order], second[order] / 7, temperature=temperature).item() == pytest.approx(
        expected, rel=1e-9
    )


def test_gathered_shares_add_up_to_the_whole_with_its_gradient():
    """Each of two ranks has three images and sees those of the other: the sum is the loss over all six."""
    first, second = (one.clone().requires_grad_() for one in views(6, 4))
    whole = nt_xent(first, second)
    expected = torch.autograd.grad(whole, (first, second))
    total = 0.0
    for rank in range(2):
        part = slice(3 * rank, 3 * rank + 3)
        normal = [torch.nn.functional.normalize(one, dim=-1) for one in (first, second)]
        gathered = iter(normal)
        total = total + nt_xent(first[part], second[part], gather=lambda rows: next(gathered), rank=rank)  # noqa: B023
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(torch.autograd.grad(total, (first, second)), expected)


def test_half_precision_is_computed_in_float32():
    first, second = (one.bfloat16() for one in views(8, 16))
    assert nt_xent(first, second, temperature=0.05).dtype == torch.float32
    torch.testing.assert_close(
        nt_xent(first, second, temperature=0.05), nt_xent(first.float(), second.float(), temperature=0.05)
    )
