import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data import FirstBatches, SequentialBatches, ShuffledBatches
from tameformer.errors import DataError


@given(size=st.integers(1, 40), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_an_epoch_sees_every_sample_once_but_for_the_tail(size, batch_size, seed):
    batch_size = min(size, batch_size)
    plan = ShuffledBatches(size, batch_size, seed)
    steps = plan.steps_in_epoch(0)
    assert steps == size // batch_size
    for epoch in range(3):
        batches = [plan.batch(epoch * steps + step) for step in range(steps)]
        assert all(len(batch) == batch_size for batch in batches)
        assert {(batch.seed, batch.epoch) for batch in batches} == {(seed, epoch)}
        seen = np.concatenate([batch.indices for batch in batches])
        assert len(np.unique(seen)) == len(seen) == steps * batch_size
        assert seen.max() < size


def test_order_is_a_function_of_seed_and_epoch_alone():
    straight = ShuffledBatches(100, 10, 3)
    order = [straight.batch(step).indices for step in range(30)]
    for step in (29, 0, 15, 9, 10):  # any step first, in any order, from a fresh plan
        assert np.array_equal(ShuffledBatches(100, 10, 3).batch(step).indices, order[step])
        assert np.array_equal(straight.batch(step).indices, order[step])
    assert not np.array_equal(order[0], order[10])
    assert not np.array_equal(ShuffledBatches(100, 10, 4).batch(0).indices, order[0])


def test_locate():
    plan = ShuffledBatches(105, 10, 0)
    assert [plan.locate(step) for step in (0, 9, 10, 25)] == [(0, 0), (0, 9), (1, 0), (2, 5)]
    assert plan.batch(25).epoch == 2
    with pytest.raises(IndexError, match="counted from 0, got -1"):
        plan.batch(-1)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(DataError, match="batch_size 64 is larger than the data, which has 10 samples: take"):
        ShuffledBatches(10, 64, 0)


@pytest.mark.parametrize("plan", [ShuffledBatches, SequentialBatches])
def test_sizes_are_checked(plan):
    with pytest.raises(DataError, match="the data has 0 samples"):
        plan(0, 4)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        plan(4, 0)


def test_sequential_batches_keep_the_tail():
    plan = SequentialBatches(10, 4)
    assert plan.steps_in_epoch(0) == 3
    assert [plan.batch(step).indices.tolist() for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    for step in (3, -1):
        with pytest.raises(IndexError, match=f"{step}"):
            plan.batch(step)


def test_first_batches_repeat_with_the_same_randomness():
    inner = ShuffledBatches(20, 5, 0)
    plan = FirstBatches(inner, 2)
    assert plan.steps_in_epoch(7) == 2
    assert plan.locate(5) == (2, 1)
    for step in range(6):
        again, first = plan.batch(step), inner.batch(step % 2)
        assert (again.seed, again.epoch, again.indices.tolist()) == (first.seed, first.epoch, first.indices.tolist())
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        FirstBatches(inner, 0)
