import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tameformer.nn.positions import (
    LearnedPositions,
    RotaryPositions,
    SinusoidalPositions,
    rotary_angles,
    rotate,
    sinusoidal_table,
)


@settings(max_examples=40, deadline=None)
@given(
    half=st.integers(1, 8), first=st.integers(0, 200), distance=st.integers(0, 100), shift=st.integers(0, 300),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_rotary_products_depend_on_the_distance_only(half, first, distance, shift, seed):
    query, key = torch.randn(2, 2 * half, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    angles = rotary_angles(601, 2 * half)

    def turned(x, position):
        return rotate(x[None, None, None], angles[position].cos(), angles[position].sin()).flatten()

    here = turned(query, first + distance) @ turned(key, first)
    there = turned(query, first + distance + shift) @ turned(key, first + shift)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-10)
    torch.testing.assert_close(turned(query, first).norm(), query.norm(), rtol=1e-12, atol=0)


def test_rotary_turns_pairs_as_complex_numbers():
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    positions = torch.arange(5, dtype=torch.float64)
    frequencies = torch.tensor([10_000 ** (-2 * i / 8) for i in range(4)], dtype=torch.float64)
    turns = torch.polar(torch.ones(5, 4, dtype=torch.float64), positions[:, None] * frequencies)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turns
    got = RotaryPositions(16, 8).double()(x)
    torch.testing.assert_close(got, torch.cat([expected.real, expected.imag], dim=-1), rtol=0, atol=1e-6)


def test_rotary_at_position_zero_changes_nothing():
    x = torch.randn(1, 2, 1, 8)
    assert RotaryPositions(4, 8)(x).equal(x)


def test_sinusoidal_formula():
    table = sinusoidal_table(50, 6)
    for position in (0, 1, 17, 49):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert float(table[position, 2 * i]) == pytest.approx(math.sin(angle), abs=1e-6)
            assert float(table[position, 2 * i + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_added_positions(kind):
    module, x = kind(9, 6), torch.randn(2, 5, 6)
    table = module.table.detach()
    torch.testing.assert_close(module(x), x + table[:5], rtol=0, atol=0)
    torch.testing.assert_close(module(x, start=4), x + table[4:], rtol=0, atol=0)
    positions = torch.tensor([[0, 1, 0, 1, 2], [8, 7, 6, 5, 4]])
    torch.testing.assert_close(module(x, positions), x + table[positions], rtol=0, atol=0)


def test_rotary_start_and_positions_agree():
    module, x = RotaryPositions(9, 8), torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(module(x, start=4), module(x, torch.arange(4, 9).expand(2, 5)), rtol=0, atol=0)
    assert not module(x, start=4).equal(module(x))


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_too_long_a_sequence(kind):
    with pytest.raises(ValueError, match="expected at most 4 positions, got 5; shorten the sequence"):
        kind(4, 6)(torch.randn(1, 3, 6), start=2)


def test_odd_sizes():
    with pytest.raises(ValueError, match="even head_dim for rotary positions, got 5"):
        RotaryPositions(4, 5)
    with pytest.raises(ValueError, match="even dim for sinusoidal positions, got 5"):
        SinusoidalPositions(4, 5)


def test_only_the_learned_table_is_saved():
    assert list(LearnedPositions(4, 6).state_dict()) == ["table"]
    assert not SinusoidalPositions(4, 6).state_dict()
    assert not RotaryPositions(4, 6).state_dict()
