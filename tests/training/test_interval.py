import json
import math

import pytest

from tameformer.training.interval import Interval


def filled(losses, items, norms, skipped=0, bound=1.0):
    interval = Interval(num_skipped=skipped)
    for loss, count, norm in zip(losses, items, norms, strict=True):
        interval.add(loss, norm, count, clip={"clipped": float(norm > bound), "limit/decay": 2 * norm})
    return interval


def test_every_target_weighs_the_same():
    line = filled([1.0, 3.0], [30.0, 10.0], [0.5, 2.0]).line()
    assert line["train/loss"] == pytest.approx((1.0 * 30 + 3.0 * 10) / 40)
    assert line["train/grad_norm"] == pytest.approx(1.25)
    assert line["train/grad_norm_max"] == 2.0
    assert line["train/clip_rate"] == 0.5


def test_skipped_steps_are_counted_and_part_of_no_mean():
    line = filled([1.0, 1.0], [1.0, 1.0], [1.0, 1.0], skipped=3).line()
    assert line == {"train/skipped": 3.0, "train/loss": 1.0, "train/grad_norm": 1.0, "train/grad_norm_max": 1.0,
                    "train/clip_rate": 0.0, "train/clip_limit/decay": 2.0}  # fmt: skip
    assert "train/skipped" not in filled([1.0], [1.0], [1.0]).line()
    assert filled([], [], [], skipped=2).line() == {"train/skipped": 2.0}


def test_state_round_trip_through_json_is_exact():
    interval = filled([1.1, 2.2], [3.0, 4.0], [0.1, 0.2], skipped=1)
    other = Interval.of(json.loads(json.dumps(interval.state())))
    assert other == interval
    other.add(1.0, 1.0, 1.0)
    assert len(interval) == 2


def test_what_clipping_does_not_know_yet_is_not_logged():
    interval = Interval()
    interval.add(1.0, 1.0, 1.0, clip={"clipped": 0.0, "limit/decay": math.inf})
    assert "train/clip_limit/decay" not in interval.line()
    without = Interval()
    without.add(1.0, 1.0, 1.0)
    assert "train/clip_rate" not in without.line()
