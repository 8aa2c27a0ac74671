"""Against hand calculation, tables, and a slow obvious way."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer.studies.statistics import Interval, clipped, interval, learning_rate_sensitivity, usable_range

NAN, INF = math.nan, math.inf


# Two-sided 95 % points of Student's t, from printed tables.
@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (31, 2.042)])
def test_the_interval_is_students(n, t):
    values = np.arange(n) * 0.5
    found = interval(values.tolist())
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    assert found.half_width == pytest.approx(t * values.std(ddof=1) / math.sqrt(n), rel=2e-4)
    assert (found.low, found.high) == (found.mean - found.half_width, found.mean + found.half_width)


def test_one_value_has_no_interval_and_none_has_nothing():
    assert interval([3.0]) == Interval(3.0, None, 1)
    assert interval([37 / 360] * 3).half_width == 0.0  # all at chance: the mean rounds, the spread must not
    assert (Interval(3.0, None, 1).low, Interval(3.0, None, 1).high) == (3.0, 3.0)
    assert interval([]) is None


def test_the_interval_holds_the_truth_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(2.0, 3.0, (4000, 4))
    found = [interval(row.tolist()) for row in draws]
    assert np.mean([one.low <= 2.0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.012)


def test_a_non_finite_value_is_not_hidden_in_a_mean():
    assert math.isnan(interval([1.0, NAN]).mean)
    assert math.isnan(interval([1.0, INF, -INF]).mean)


def test_sensitivity_by_hand():
    # best 1; losses above the start and non-finite ones count as the start, 3: (0.5 + 0 + 2 + 2 + 2) / 5
    assert learning_rate_sensitivity([1.5, 1.0, 8.0, NAN, INF], initial=3.0) == pytest.approx(1.3)
    assert learning_rate_sensitivity([1.0, 1.0], initial=3.0) == 0
    assert (
        learning_rate_sensitivity([NAN, 9.0], initial=3.0) == 0
    )  # learned nothing anywhere: read it beside the best loss
    assert learning_rate_sensitivity([-INF, 1.0], initial=3.0) == pytest.approx(1.0)  # not a number that was reached


@given(st.lists(st.one_of(st.floats(0, 20), st.just(NAN)), min_size=1, max_size=8), st.floats(0.5, 10))
def test_sensitivity_is_what_a_slow_loop_gives_and_within_its_bounds(losses, initial):
    total, best = 0.0, initial
    for loss in losses:
        if loss == loss and loss < best:
            best = loss
    for loss in losses:
        total += (initial if loss != loss or loss > initial else loss) - best
    found = learning_rate_sensitivity(losses, initial)
    assert found == pytest.approx(total / len(losses), abs=1e-12)
    assert 0 <= found <= initial


RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0, 1.1, 1.19, 1.21, 1.1], (1e-4, 1e-3)),  # start 3, best 1: up to 1.2
        ([1.1, NAN, 1.1, 1.0, 1.1], (1e-3, 1e-2)),
        ([1.0, 9.0, 1.1, 9.0, 1.1], (1e-4, 1e-4)),  # three of one rate: the best one
        ([1.1, 1.1, NAN, 1.0, 2.0], (1e-4, 3e-4)),  # the wider one, though the best is in the other
        ([NAN, NAN, NAN, NAN, NAN], None),
        ([3.0, 3.5, NAN, 3.0, 4.0], None),
        ([NAN, NAN, NAN, NAN, 2.9], (1e-2, 1e-2)),
    ],
)
def test_usable_range_by_hand(losses, expected):
    assert usable_range(RATES, losses, initial=3.0) == expected


def test_the_tolerance_widens_the_range():
    losses = [2.5, 1.5, 1.0, 1.9, NAN]
    assert usable_range(RATES, losses, initial=3.0, tolerance=0.0) == (1e-3, 1e-3)
    assert usable_range(RATES, losses, initial=3.0, tolerance=0.25) == (3e-4, 1e-3)
    assert usable_range(RATES, losses, initial=3.0, tolerance=0.5) == (3e-4, 3e-3)
    assert usable_range(RATES, losses, initial=3.0, tolerance=0.99) == (1e-4, 3e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipped([1.0], NAN), "must be finite, got nan"),
        (lambda: learning_rate_sensitivity([], 1.0), "at least one rate, got none"),
        (lambda: usable_range([2.0, 1.0], [1.0, 1.0], 3.0), r"ascending rates and a loss for each, got \[2.0, 1.0\]"),
        (lambda: usable_range([1.0], [1.0], 3.0, tolerance=1.0), r"in \[0, 1\), got 1.0"),
        (lambda: interval([1.0], confidence=95), "between 0 and 1, got 95"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
