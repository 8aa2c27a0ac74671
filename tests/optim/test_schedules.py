import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.optim import OptimConfig, schedule, schedules, warmup_steps

ALL = (
    schedules.constant,
    schedules.linear,
    schedules.cosine,
    schedules.one_cycle,
    schedules.inverse_sqrt,
    schedules.warmup_stable_decay,
    schedules.triangle,
)


@pytest.mark.parametrize("function", ALL)
@given(total=st.integers(1, 500), share=st.floats(0, 1), step=st.integers(0, 1000))
def test_stays_between_zero_and_one(function, total, share, step):
    assert 0.0 <= function(step, total_steps=total, warmup_steps=round(share * total)) <= 1.0


@pytest.mark.parametrize("function", ALL)
def test_reaches_one_at_the_end_of_the_warmup(function):
    values = [function(step, total_steps=100, warmup_steps=20) for step in range(100)]
    assert max(values) == values[20] == 1.0
    assert values[:21] == sorted(values[:21])
    assert values[0] > 0


@pytest.mark.parametrize(
    "function",
    [schedules.linear, schedules.cosine, schedules.one_cycle, schedules.warmup_stable_decay, schedules.triangle],
)
def test_ends_at_the_final_ratio(function):
    assert function(100, total_steps=100, warmup_steps=10, final_ratio=0.1) == pytest.approx(0.1)
    assert function(100, total_steps=100) == pytest.approx(0.0)


def test_noam_is_inverse_sqrt():
    """Vaswani et al. 2017, eq. 3: dim^-0.5 min(s^-0.5, s w^-1.5), with s counted from 1, after the warm-up."""
    dim, warmup = 512, 4000
    peak = (dim * warmup) ** -0.5
    for s in (4000, 8000, 20_000):
        noam = dim**-0.5 * min(s**-0.5, s * warmup**-1.5)
        assert peak * schedules.inverse_sqrt(s, total_steps=100_000, warmup_steps=warmup) == pytest.approx(noam)


def test_one_cycle_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=101, pct_start=0.31, div_factor=25, final_div_factor=1e12
    )
    for step in range(100):
        ours = schedules.one_cycle(step, total_steps=100, warmup_steps=30)
        # Torch's phases end at pct_start * total_steps - 1 = 30.31: compare with a tolerance of that third of a step.
        assert ours == pytest.approx(torchs.get_last_lr()[0], abs=0.02)
        optimizer.step()
        torchs.step()


def test_cosine_is_torchs():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert schedules.cosine(step, total_steps=50) == pytest.approx(torchs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        torchs.step()


def test_triangle_rises_for_half_of_the_run():
    values = [schedules.triangle(step, total_steps=100) for step in range(101)]
    assert values[50] == 1.0
    assert values[25] == pytest.approx(0.5, abs=0.02)
    assert values[75] == pytest.approx(0.5)


def test_warmup_as_steps_or_share():
    assert warmup_steps(OptimConfig(warmup_steps=7), total_steps=100) == 7
    assert warmup_steps(OptimConfig(warmup_steps=0.25), total_steps=100) == 25
    with pytest.raises(ValueError, match="warmup_steps is 101, longer than the run of 100 steps"):
        warmup_steps(OptimConfig(warmup_steps=101), total_steps=100)


def test_final_ratio_where_it_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="final_lr_ratio has no meaning for the schedule constant"):
        schedule(OptimConfig(schedule="constant", final_lr_ratio=0.1), total_steps=10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peak_lr": 0.0}, "peak_lr must be positive, got 0.0"),
        ({"warmup_steps": 1.5}, "share of the run below 1, got 1.5"),
        ({"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": 1.0}, "ema_decay must lie between 0 and 1, got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"adamw_lr": 1e-3}, "adamw_lr is used by muon only"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be positive, got nan"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**values)
