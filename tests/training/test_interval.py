import math

import pytest
import torch

from tameformer.readings import Readings
from tameformer.training.engine import Engine
from tameformer.training.interval import Interval
from tameformer.training.step import StepResult


def filled(losses, items, norms):
    interval = Interval()
    for loss, count, norm in zip(losses, items, norms, strict=True):
        interval.add(StepResult(torch.tensor(loss * count), count, torch.tensor(norm), False))
    return interval


def on_host(interval):
    return interval.on_host(Readings(interval.tensors(Engine())).values())


def test_every_target_weighs_the_same():
    interval = filled([1.0, 3.0], [30.0, 10.0], [0.5, 2.0])
    losses, norms = on_host(interval)
    line = interval.line(losses, norms, max_grad_norm=1.0)
    assert line["train/loss"] == pytest.approx((1.0 * 30 + 3.0 * 10) / 40)
    assert line["train/grad_norm"] == pytest.approx(1.25)
    assert line["train/grad_norm_max"] == 2.0
    assert line["train/clip_rate"] == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_is_shown_and_not_averaged(bad):
    interval = filled([1.0, bad, 1.0], [1.0, 1.0, 1.0], [1.0, bad, 1.0])
    line = interval.line(*on_host(interval), max_grad_norm=10.0)
    for key in ("train/loss", "train/grad_norm", "train/grad_norm_max"):
        assert line[key] == bad or (math.isnan(line[key]) and math.isnan(bad))


def test_state_round_trip_is_exact():
    interval = filled([1.1, 2.2], [3.0, 4.0], [0.1, 0.2])
    other = Interval()
    other.load(interval.state(), torch.device("cpu"))
    assert on_host(other) == on_host(interval)
    assert other.state() == interval.state()
