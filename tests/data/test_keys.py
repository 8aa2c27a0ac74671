import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data import SampleKeys, permutation, split, uniforms
from tameformer.errors import DataError


def keys(indices, seed=0, epoch=0):
    return SampleKeys(seed, epoch, np.asarray(indices, dtype=np.int64))


@given(size=st.integers(1, 60), parts=st.integers(1, 60))
def test_parts_are_contiguous_and_as_even_as_possible(size, parts):
    if size < parts:
        with pytest.raises(DataError, match=rf"{size} samples .* {parts} parts"):
            split(keys(range(size)), parts)
        return
    pieces = split(keys(range(size), seed=3, epoch=5), parts)
    assert np.concatenate([piece.indices for piece in pieces]).tolist() == list(range(size))
    lengths = [len(piece) for piece in pieces]
    assert len(lengths) == parts
    assert max(lengths) - min(lengths) <= 1
    assert {(piece.seed, piece.epoch) for piece in pieces} == {(3, 5)}


@pytest.mark.parametrize("indices", [np.zeros((2, 2), np.int64), np.zeros(2, np.int32), np.zeros(2)])
def test_indices_of_another_kind_are_refused(indices):
    with pytest.raises(ValueError, match=r"indices must be one row of int64, got .*shape"):
        SampleKeys(0, 0, indices)


def test_split_into_no_parts_is_refused():
    with pytest.raises(ValueError, match="parts must be at least 1, got 0"):
        split(keys([1]), 0)


def slow_uniform(seed, epoch, index, draw, salt):
    """The same hash with Python's integers, one number at a time."""

    def mix(word):
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
        return word ^ (word >> 31)

    golden, word = 0x9E3779B97F4A7C15, 0
    for part in (salt, seed, epoch):
        word = mix((word + golden + part) % 2**64)
    sample = mix((index * golden + word) % 2**64)
    return (mix((sample + (draw + 1) * golden) % 2**64) >> 11) / 2**53


@given(
    seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40), index=st.integers(0, 2**62), salt=st.integers(0, 2**32 - 1)
)
def test_uniforms_equal_a_slow_hash(seed, epoch, index, salt):
    fast = uniforms(keys([index], seed, epoch), 3, salt)
    assert fast.tolist() == [[slow_uniform(seed, epoch, index, draw, salt) for draw in range(3)]]


def test_uniforms_belong_to_their_sample():
    every = uniforms(keys(range(100), seed=7, epoch=2), 5, "crop")
    chosen = np.random.default_rng(0).permutation(100)[:30]
    assert np.array_equal(uniforms(keys(chosen, seed=7, epoch=2), 5, "crop"), every[chosen])
    assert np.array_equal(uniforms(keys(range(100), seed=7, epoch=2), 2, "crop"), every[:, :2])
    for other in (keys(range(100), 8, 2), keys(range(100), 7, 3)):
        assert not np.isin(uniforms(other, 5, "crop"), every).any()
    assert not np.isin(uniforms(keys(range(100), 7, 2), 5, "flip"), every).any()


def test_uniforms_are_uniform_and_independent():
    samples, count = 20_000, 8
    u = uniforms(keys(range(samples), seed=1, epoch=0), count, 0)
    assert u.min() >= 0
    assert u.max() < 1
    # Chi-squared with 99 degrees of freedom: mean 99, standard deviation 14.
    observed = np.histogram(u, bins=100, range=(0, 1))[0]
    assert abs(((observed - u.size / 100) ** 2).sum() / (u.size / 100) - 99) < 5 * 14
    nearby = [
        u[1:, 0],  # the next sample
        u[:-1, 1],  # the next draw
        uniforms(keys(range(samples - 1), seed=1, epoch=1), 1, 0)[:, 0],
        uniforms(keys(range(samples - 1), seed=2, epoch=0), 1, 0)[:, 0],
        uniforms(keys(range(samples - 1), seed=1, epoch=0), 1, 1)[:, 0],
    ]
    for other in nearby:
        assert abs(np.corrcoef(u[:-1, 0], other)[0, 1]) < 5 / samples**0.5
        pairs = np.histogram2d(u[:-1, 0], other, bins=10, range=((0, 1), (0, 1)))[0]
        assert abs(((pairs - samples / 100) ** 2).sum() / (samples / 100) - 99) < 5 * 14


def test_uniforms_of_nothing():
    assert uniforms(keys([]), 3, 0).shape == (0, 3)
    assert uniforms(keys([1, 2]), 0, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="count must not be negative, got -1"):
        uniforms(keys([1]), -1, 0)


def test_permutation_is_a_function_of_its_arguments():
    order = permutation(1000, seed=0, epoch=0, salt="order")
    assert sorted(order.tolist()) == list(range(1000))
    assert order.dtype == np.int64
    assert np.array_equal(order, permutation(1000, seed=0, epoch=0, salt="order"))
    for other in (
        dict(seed=1, epoch=0, salt="order"),
        dict(seed=0, epoch=1, salt="order"),
        dict(seed=0, epoch=0, salt="x"),
    ):
        assert (order == permutation(1000, **other)).sum() < 10
