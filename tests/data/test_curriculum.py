import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data import LengthCurriculum, Plan, ShuffledBatches
from tameformer.data.buckets import TokenBuckets
from tameformer.data.curriculum import linear, within_tokens
from tameformer.errors import DataError

LENGTHS = np.random.default_rng(0).integers(1, 60, 200)


def plan(**settings):
    return LengthCurriculum(
        ShuffledBatches(200, 8, seed=3), LENGTHS, **{"warmup_steps": 40, "batch_size": 8, "seed": 3, **settings}
    )


def test_goes_from_short_to_long_and_ends_as_the_other_plan():
    one = plan(competence=linear)
    assert isinstance(one, Plan)
    longest = []
    for step in range(40):
        keys = one.batch(step)
        allowed = np.sort(LENGTHS)[one.admitted(step) - 1]
        assert LENGTHS[keys.indices].max() <= allowed
        assert len(set(keys.indices.tolist())) == 8
        longest.append(allowed)
    assert longest == sorted(longest)
    assert longest[0] < 10
    assert longest[-1] > 50
    for step in range(40, 90):
        behind = ShuffledBatches(200, 8, seed=3).batch(step - 40)
        keys = one.batch(step)
        assert keys.indices.tolist() == behind.indices.tolist()
        assert keys.epoch == behind.epoch + 1


@given(step=st.integers(0, 300), before=st.lists(st.integers(0, 300), max_size=5))
def test_a_step_is_a_pure_function_of_seed_and_step(step, before):
    used = plan()
    for other in before:
        used.batch(other)
    one, two = used.batch(step), plan().batch(step)
    assert (one.seed, one.epoch, one.indices.tolist()) == (two.seed, two.epoch, two.indices.tolist())
    assert used.locate(step) == plan().locate(step)


def test_epochs_cover_the_steps():
    one = plan()
    for epoch, first in ((0, 0), (1, 40), (2, 65)):
        assert one.locate(first) == (epoch, 0)
        assert one.locate(first + one.steps_in_epoch(epoch) - 1) == (epoch, one.steps_in_epoch(epoch) - 1)
    assert plan(seed=4).batch(5).indices.tolist() != one.batch(5).indices.tolist()
    open_to_all = plan(competence=lambda progress: 1.0)
    assert open_to_all.batch(5).indices.tolist() != open_to_all.batch(6).indices.tolist()


def test_sides_and_another_plan_behind():
    sides = np.stack([LENGTHS, LENGTHS[::-1]], axis=1)
    one = LengthCurriculum(TokenBuckets(sides, 500, 0), sides, warmup_steps=3, batch_size=4)
    assert sides[one.batch(0).indices].max() < 30
    assert one.batch(3).indices.tolist() == TokenBuckets(sides, 500, 0).batch(0).indices.tolist()


def test_a_bound_on_tokens_holds_for_every_draw_and_is_used():
    sides = np.stack([LENGTHS, np.roll(LENGTHS, 1)], axis=1)
    size = within_tokens(sides, 400)
    one = LengthCurriculum(TokenBuckets(sides, 400, 0), sides, warmup_steps=40, batch_size=size)
    padded = []
    for step in range(40):
        indices = one.batch(step).indices
        assert len(set(indices.tolist())) == len(indices)
        padded.append(len(indices) * sides[indices].max(axis=0).sum())
    assert max(padded) <= 400
    assert max(padded) > 300
    # The same by hand: the shortest by their longer side, padded to the longest of them on each side.
    shortest = sides[np.argsort(sides.max(axis=1), kind="stable")]
    assert [size(count) for count in (1, 50, 200)] == [
        400 // shortest[:count].max(axis=0).sum() for count in (1, 50, 200)
    ]
    few = LengthCurriculum(
        TokenBuckets(sides, 400, 0), sides, warmup_steps=40, batch_size=lambda admitted: 1, min_batch_size=3
    )
    assert {len(few.batch(step).indices) for step in range(40)} == {3}


def test_wrong_settings():
    with pytest.raises(DataError, match="at least batch_size 300 samples, got 200"):
        plan(batch_size=300)
    with pytest.raises(ValueError, match="at least 1, got 0, 8 and 1"):
        plan(warmup_steps=0)
    with pytest.raises(IndexError, match="counted from 0, got -1"):
        plan().batch(-1)
