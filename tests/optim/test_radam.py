"""What `radam` in a configuration does, step by step: torch's RAdam, whose first five steps are not adaptive."""

import math

import pytest
import torch
from torch import nn

from tameformer.optim import OptimConfig, optimizers


def rectification(step, beta2):
    """r_t of Liu et al. 2020 (arXiv:1908.03265, algorithm 2); None while the variance of v has no estimate."""
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5:  # the paper says 4, torch and the authors' code 5
        return None
    above = (length - 4) * (length - 2) * longest
    return math.sqrt(above / ((longest - 4) * (longest - 2) * length))


def built(weight, **settings):
    holder = nn.Module()
    holder.weight = weight
    (optimizer,) = optimizers(holder, OptimConfig(name="radam", **settings))
    return optimizer


@pytest.mark.parametrize(("beta2", "at_six", "after"), [(0.95, 0.18, 40), (0.98, 0.116, 100), (0.999, 0.026, 2000)])
def test_steps_are_as_long_as_the_rectification_says(beta2, at_six, after):
    """With a gradient of 1 Adam's steps are all one rate long, so that what is left is r_t: a warm-up over 2 / (1 - beta2)."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = built(weight, peak_lr=0.5, betas=(0.9, beta2), eps=1e-16, weight_decay=0.0)
    lengths = []
    for _ in range(after):
        weight.grad, before = torch.ones_like(weight), weight.item()
        optimizer.step()
        lengths.append((before - weight.item()) / 0.5)
    expected = [rectification(step, beta2) for step in range(1, after + 1)]
    assert [value is None for value in expected[:7]] == [True] * 5 + [False] * 2
    assert lengths == pytest.approx([1.0 if value is None else value for value in expected], rel=1e-6)
    assert lengths[5] == pytest.approx(at_six, abs=0.005)
    assert 0.80 < lengths[-1] < 0.84


def test_equals_the_formula_in_float64():
    """Decoupled weight decay at the full rate; before the sixth step the mean gradient itself, after it Adam's step times r."""
    lr, (beta1, beta2), eps, decay = 0.02, (0.9, 0.98), 1e-8, 0.3
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    linear = nn.Linear(4, 3, dtype=torch.float64)  # a matrix, which is decayed
    linear.weight = weight
    (optimizer,) = optimizers(
        linear, OptimConfig(name="radam", peak_lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    )
    by_hand, m, v = weight.detach().clone(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for step in range(1, 13):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient.square()
        update, rectified = m / (1 - beta1**step), rectification(step, beta2)
        if rectified is not None:
            update = rectified * update * math.sqrt(1 - beta2**step) / (v.sqrt() + eps)
        by_hand = by_hand * (1 - lr * decay) - lr * update
        torch.testing.assert_close(weight.detach(), by_hand, rtol=1e-12, atol=1e-12)
