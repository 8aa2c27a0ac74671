"""Films of moving digits: what moves, where to, and that nothing else tells."""

import itertools
import math

import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys
from tameformer.data.sources import digits
from tameformer.data.sources.moving_digits import DIRECTIONS, MovingDigits
from tameformer.errors import DataError

STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}


def fetched(source, count=60, seed=1, epoch=2):
    return source.fetch(SampleKeys(seed, epoch, np.arange(count)))


def brightness(source, batch):
    return batch["films"][:, 0].double() * source.digits.std[0] + source.digits.mean[0]


@pytest.mark.parametrize("speed", [1.0, math.sqrt(2)])
def test_digits_move_along_their_direction(speed):
    source = MovingDigits(digits("test"), num_samples=60, side=12, speed=(speed, speed))
    batch = fetched(source)
    films, straight = brightness(source, batch), 0
    for film, label in zip(films, batch["labels"].tolist(), strict=True):
        name = DIRECTIONS[label]
        parts = name.split()
        if len(parts) != (1 if speed == 1 else 2):  # whole pixels along the axes, or along the diagonals
            continue
        straight += 1
        moved = tuple(sum(STEPS[part][axis] for part in parts) for axis in (0, 1))
        for before, after in itertools.pairwise(film):
            torch.testing.assert_close(torch.roll(before, moved, (0, 1)), after, rtol=0, atol=1e-5)
    assert straight > 15
    assert set(batch["labels"].tolist()) == set(range(8))


def test_a_frame_is_its_digit_whatever_the_place():
    source = MovingDigits(digits("test"), num_samples=60, target="both")
    batch = fetched(source)
    sums = brightness(source, batch).sum((2, 3))
    torch.testing.assert_close(sums, sums[:, :1].expand_as(sums), rtol=1e-5, atol=1e-4)  # nothing leaves the field
    known = {round(float(image.sum()), 3) for image in source.digits.images}
    assert all(min(abs(value - other) for other in known) < 2e-3 for value in sums[:, 0].tolist())
    assert len(source.class_names) == 80
    digit = MovingDigits(digits("test"), num_samples=60, target="digit")
    direction = MovingDigits(digits("test"), num_samples=60)
    expected = fetched(digit)["labels"] * 8 + fetched(direction)["labels"]
    assert torch.equal(batch["labels"], expected)


def test_a_film_is_a_function_of_its_sample_alone():
    source = MovingDigits(digits("test"), num_samples=60, noise=0.3)
    whole = fetched(source)
    part = source.fetch(SampleKeys(1, 2, np.array([40, 4], dtype=np.int64)))
    assert torch.equal(part["films"], whole["films"][[40, 4]])
    assert not torch.equal(fetched(source, epoch=3)["films"], whole["films"])
    clean = fetched(MovingDigits(digits("test"), num_samples=60))
    noise = (whole["films"] - clean["films"]) * source.digits.std[0]
    assert abs(float(noise.std()) - 0.3) < 0.005
    assert abs(float(noise.mean())) < 0.005


def test_a_field_smaller_than_a_digit_is_refused():
    with pytest.raises(DataError, match=r"at most 6 x 6 pixels, got 1 of 8 x 8; raise data\.side to 8 or more"):
        MovingDigits(digits("test"), num_samples=1, side=6)
