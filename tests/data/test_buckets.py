import time

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tameformer.data.buckets import LengthSortedBatches, TokenBuckets, padding_share
from tameformer.data.plans import ShuffledBatches
from tameformer.data.text import read_lines
from tameformer.errors import DataError

LENGTHS = np.random.default_rng(0).integers(3, 40, (700, 2))


def epoch_of(plan, epoch):
    first = plan.first_step(epoch)
    return [plan.batch(step) for step in range(first, first + plan.steps_in_epoch(epoch))]


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=80),
    min_batch_size=st.integers(1, 5),
    spare=st.integers(0, 200),
    noise=st.sampled_from([0.0, 1.0, 7.5]),
)
def test_every_sample_once_an_epoch_within_the_bounds(lengths, min_batch_size, spare, noise):
    assume(len(lengths) >= min_batch_size)
    lengths = np.array(lengths)
    widest = lengths.max(axis=0).sum() if min_batch_size > 1 else lengths.sum(axis=1).max()
    max_tokens = int((2 * min_batch_size - 1) * widest) + spare
    plan = TokenBuckets(lengths, max_tokens, 3, min_batch_size=min_batch_size, noise=noise)
    for epoch in (0, 1):
        batches = epoch_of(plan, epoch)
        assert sorted(np.concatenate([batch.indices for batch in batches])) == list(range(len(lengths)))
        for batch in batches:
            assert (batch.seed, batch.epoch) == (3, epoch)
            assert len(batch) >= min_batch_size
            assert len(batch) * lengths[batch.indices].max(axis=0).sum() <= max_tokens


def test_a_batch_is_as_large_as_its_tokens_allow():
    plan = TokenBuckets(np.full(100, 10), 95, seed=0)
    assert sorted(len(batch) for batch in epoch_of(plan, 0)) == [1] + [9] * 11
    plan = TokenBuckets(np.full((100, 2), 5), 95, seed=0, min_batch_size=5)
    assert sorted(len(batch) for batch in epoch_of(plan, 0)) == [5, 5] + [9] * 10
    assert plan.steps_in_epoch(0) == 12
    assert len(TokenBuckets(np.full(100, 10), 10_000, seed=0).batch(0)) == 100


def test_order_and_composition_are_functions_of_seed_and_epoch():
    def told(seed, epoch):
        return [batch.indices.tolist() for batch in epoch_of(TokenBuckets(LENGTHS, 600, seed), epoch)]

    def sets(batches):
        return {frozenset(batch) for batch in batches}

    assert told(0, 2) == told(0, 2)
    for other in (told(0, 3), told(1, 2)):
        assert len(sets(told(0, 2)) & sets(other)) < 3  # other companions, not only another order
    longest = [LENGTHS[batch].max() for batch in told(0, 2)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3  # short and long batches take turns


def test_the_same_batches_come_in_another_order_in_each_epoch():
    plan = TokenBuckets(LENGTHS, 600, seed=0, noise=0.0)
    first, second = ([sorted(batch.indices.tolist()) for batch in epoch_of(plan, epoch)] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_steps_are_found_across_epochs_of_different_size():
    plan = TokenBuckets(LENGTHS, 400, seed=0, noise=9.0)
    counts = [plan.steps_in_epoch(epoch) for epoch in range(12)]
    assert len(set(counts)) > 1
    expected = [(epoch, place) for epoch, count in enumerate(counts) for place in range(count)]
    assert [plan.locate(step) for step in range(sum(counts))] == expected
    last = sum(counts) - 1
    fresh = TokenBuckets(LENGTHS, 400, seed=0, noise=9.0)  # a resumed run asks for a late step first
    assert fresh.batch(last).indices.tolist() == plan.batch(last).indices.tolist()
    assert fresh.batch(0).indices.tolist() == plan.batch(0).indices.tolist()
    with pytest.raises(IndexError, match="counted from 0, got -1"):
        plan.batch(-1)


def test_noise_mixes_lengths_and_pads_more():
    shares = [padding_share(TokenBuckets(LENGTHS, 600, 0, noise=noise), LENGTHS) for noise in (0.0, 1.0, 5.0, 40.0)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
    assert shares[1] < shares[2] < shares[3]


def test_padding_share_against_padded_arrays():
    lengths = np.array([[2, 3], [4, 1], [3, 3], [1, 1]])
    plan = TokenBuckets(lengths, 14, seed=1)
    for epoch in (0, 2):
        real = padded = 0
        for batch in epoch_of(plan, epoch):
            for side in (0, 1):
                rows = [[1] * length for length in lengths[batch.indices, side]]
                width = max(map(len, rows))
                padded += sum(len(row + [0] * (width - len(row))) for row in rows)
                real += sum(map(sum, rows))
        assert padding_share(plan, lengths, epoch) == pytest.approx(1 - real / padded)
    assert padding_share(ShuffledBatches(4, 1), lengths) == 0.0


def test_evaluation_goes_from_short_to_long_once():
    plan = LengthSortedBatches(LENGTHS, 600)
    batches = [plan.batch(step).indices for step in range(plan.steps_in_epoch(0))]
    order = np.concatenate(batches)
    assert sorted(order) == list(range(len(LENGTHS)))
    assert (np.diff(LENGTHS[order, 1]) >= 0).all()
    assert all(len(batch) * LENGTHS[batch].max(axis=0).sum() <= 600 for batch in batches)
    for_five = LengthSortedBatches(np.full((10, 2), 5), 95, min_batch_size=5)  # 9 and 1 without it
    assert [len(for_five.batch(step)) for step in range(for_five.steps_in_epoch(0))] == [5, 5]
    assert plan.locate(1) == (0, 1)
    with pytest.raises(IndexError, match=f"step {len(batches)} lies outside the single pass of {len(batches)} batches"):
        plan.batch(len(batches))


def test_bounds_that_cannot_be_kept_are_refused():
    lengths = np.array([[3, 4], [9, 2], [1, 8]])
    with pytest.raises(DataError, match=r"max_tokens 10 is too small: sample 1 has \[9, 2\] tokens.* max_tokens >= 11"):
        TokenBuckets(lengths, 10, seed=0)
    with pytest.raises(DataError, match=r"batches of at least 2 need max_tokens >= 51"):
        TokenBuckets(lengths, 50, seed=0, min_batch_size=2)
    with pytest.raises(DataError, match=r"at least min_batch_size 4 samples .* got 3"):
        TokenBuckets(lengths, 1000, seed=0, min_batch_size=4)
    with pytest.raises(DataError, match="at least one sample, got none"):
        LengthSortedBatches(np.empty((0, 2), dtype=np.int64), 10)
    with pytest.raises(ValueError, match="must not be negative, nor all 0, got -1 to 3"):
        TokenBuckets(np.array([3, -1]), 10, seed=0)
    with pytest.raises(ValueError, match="min_batch_size must be at least 1, got 0"):
        TokenBuckets(lengths, 100, seed=0, min_batch_size=0)
    with pytest.raises(ValueError, match="noise must not be negative"):
        TokenBuckets(lengths, 100, seed=0, noise=-1.0)


def test_a_large_plan_is_quick():
    lengths = np.random.default_rng(0).poisson(9, (165_000, 2)) + 1
    plan = TokenBuckets(lengths, 4096, seed=0)
    begin = time.process_time()
    steps = plan.steps_in_epoch(0)
    assert time.process_time() - begin < 0.5
    assert 165_000 * 20 / 4096 < steps < 165_000 * 26 / 4096


def test_real_sentences_pad_little(shared_data):
    folder = shared_data / "multi30k"
    words = [[len(line.split()) for line in read_lines(folder / f"train.{code}.gz")] for code in ("en", "de")]
    lengths = np.array(words).T
    assert padding_share(TokenBuckets(lengths, 4096, seed=0), lengths) < 0.09
    assert padding_share(LengthSortedBatches(lengths, 4096), lengths) < 0.07
    assert padding_share(ShuffledBatches(len(lengths), 128), lengths) > 0.4
