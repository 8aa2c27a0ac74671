import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tameformer.data import SampleKeys, uniforms
from tameformer.data.augment import (
    OPERATIONS,
    WIDE,
    HorizontalFlip,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomShift,
    TrivialAugment,
    color,
)
from tameformer.data.augment.geometry import affine_matrix, shift, warp
from tameformer.data.augment.policies import Ranges, apply_operations
from tameformer.data.sources.images import augment

EVERY = [
    HorizontalFlip(),
    RandomShift(pixels=3),
    RandomShift(pixels=3, padding="reflect"),
    RandomAffine(),
    RandomErasing(probability=0.7),
    TrivialAugment(),
    TrivialAugment(ranges=WIDE),
    RandAugment(num_operations=3, magnitude=20),
]
NOTHING = [
    HorizontalFlip(probability=0),
    RandomShift(pixels=0),
    RandomAffine(degrees=0, translate=0, scale=0, shear=0),
    RandomErasing(probability=0),
    RandAugment(num_operations=0),
    RandAugment(magnitude=0, operations=OPERATIONS[:-2]),
    TrivialAugment(
        ranges=Ranges(rotate=0, shear=0, translate=0, enhance=0, posterize=0, solarize=0), operations=OPERATIONS[:-2]
    ),
]


def images(batch=64, channels=3, height=12, width=10, seed=0):
    levels = torch.randint(0, 256, (batch, channels, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 255


def keys(indices, seed=0, epoch=0):
    return SampleKeys(seed, epoch, np.asarray(indices, dtype=np.int64))


def ids(transform):
    return repr(transform)[:60]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transform", EVERY, ids=ids)
def test_promises_of_every_transform(transform, channels):
    before = images(channels=channels)
    given_ = before.clone()
    state = torch.get_rng_state()
    after = augment(before, keys(range(64)), [transform])
    assert torch.equal(before, given_), "the input was changed in place"
    assert torch.equal(torch.get_rng_state(), state)
    assert after.shape == before.shape
    assert after.dtype == torch.float32
    assert after.isfinite().all()
    assert after.min() >= -1e-6
    assert after.max() <= 1 + 1e-6
    assert not torch.equal(after, before)
    assert torch.equal(after, augment(before, keys(range(64)), [transform]))
    assert not torch.equal(after, augment(before, keys(range(64), epoch=1), [transform]))
    assert not torch.equal(after, augment(before, keys(range(64), seed=1), [transform]))
    order = np.random.default_rng(0).permutation(64)  # any order, cut anywhere: bit for bit the same
    for parts in (2, 5, 64):
        pieces = [augment(before[part], keys(part), [transform]) for part in np.array_split(order, parts)]
        assert torch.equal(torch.cat(pieces), after[order])


@pytest.mark.parametrize("transform", NOTHING, ids=ids)
def test_zero_strength_changes_nothing(transform):
    before = images()
    torch.testing.assert_close(augment(before, keys(range(64)), [transform]), before, atol=2e-6, rtol=0)


@pytest.mark.parametrize("transform", EVERY, ids=ids)
def test_one_image_and_no_image(transform):
    one = augment(images(batch=1), keys([5]), [transform])
    assert one.shape == (1, 3, 12, 10)
    assert augment(images(batch=0), keys([]), [transform]).shape == (0, 3, 12, 10)


@settings(deadline=None, max_examples=30)
@given(down=st.integers(-4, 4), right=st.integers(-4, 4))
def test_shift_is_pad_and_crop(down, right):
    before = images(batch=2)
    for padding, mode in (("zero", "constant"), ("reflect", "reflect")):
        padded = torch.nn.functional.pad(before, (4, 4, 4, 4), mode=mode)
        wanted = padded[:, :, 4 - down : 16 - down, 4 - right : 14 - right]
        moved = shift(before, torch.full((2,), down), torch.full((2,), right), padding)
        assert torch.equal(moved, wanted)


def test_shifts_reach_their_bound_and_no_further():
    dot = torch.zeros(500, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    moved = augment(dot, keys(range(500)), [RandomShift(pixels=2)])
    places = {(int(y), int(x)) for _, _, y, x in moved.nonzero()}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}
    with pytest.raises(ValueError, match=r"pixels must be smaller than the image, got 9 for \(9, 9\)"):
        augment(dot, keys(range(500)), [RandomShift(pixels=9)])


def test_flip_mirrors_about_half():
    before = images(batch=400)
    after = augment(before, keys(range(400)), [HorizontalFlip()])
    mirrored = [torch.equal(one, other.flip(-1)) for one, other in zip(after, before, strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(after, before, strict=True)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert abs(sum(mirrored) - 200) < 50


def matrix(angle=0.0, scale=1.0, shear_x=0.0, shear_y=0.0, right=0.0, down=0.0):
    return affine_matrix(
        *(torch.tensor([v], dtype=torch.float64) for v in (angle, scale, shear_x, shear_y, right, down))
    )


def test_affine_maps_of_known_effect():
    square = images(batch=1, height=9, width=9)

    def same(changes, wanted):
        torch.testing.assert_close(warp(square, matrix(**changes)), wanted, atol=1e-5, rtol=0)

    same({"angle": math.pi / 2}, square.rot90(-1, (2, 3)))  # clockwise
    same({"angle": math.pi}, square.flip(2, 3))
    same({"right": 2.0}, shift(square, torch.tensor([0]), torch.tensor([2])))
    same({"down": 3.0, "right": -1.0}, shift(square, torch.tensor([3]), torch.tensor([-1])))
    sheared = torch.stack([shift(square, torch.tensor([0]), torch.tensor([4 - y]))[:, :, y] for y in range(9)], dim=2)
    same({"shear_x": 1.0}, sheared)
    enlarged = warp(square, matrix(scale=2.0))
    torch.testing.assert_close(enlarged[:, :, ::2, ::2], square[:, :, 2:7, 2:7], atol=1e-5, rtol=0)


def test_warp_equals_a_slow_loop():
    before = images(batch=2, channels=1, height=6, width=5)
    maps = torch.cat([matrix(0.4, 1.2, 0.1, -0.2, 0.7, -1.1), matrix(-1.0, 0.7, 0.0, 0.3, -2.0, 0.4)])
    after = warp(before, maps)
    for sample in range(2):
        for y in range(6):
            for x in range(5):
                source = maps[sample] @ torch.tensor([x - 2.0, y - 2.5, 1.0], dtype=torch.float64)
                column, row = float(source[0]) + 2.0, float(source[1]) + 2.5
                value = 0.0
                for j in (math.floor(row), math.floor(row) + 1):
                    for i in (math.floor(column), math.floor(column) + 1):
                        if 0 <= j < 6 and 0 <= i < 5:
                            value += (1 - abs(row - j)) * (1 - abs(column - i)) * float(before[sample, 0, j, i])
                assert float(after[sample, 0, y, x]) == pytest.approx(value, abs=1e-5)


def test_erasing_fills_a_rectangle_of_the_right_size():
    before = torch.ones(300, 3, 20, 20)
    after = augment(before, keys(range(300)), [RandomErasing(probability=0.5, area=(0.1, 0.3), fill=0.25)])
    holes = after == 0.25
    assert ((after == 1) | holes).all()
    assert torch.equal(holes[:, 0], holes[:, 2])
    sizes = holes[:, 0].sum((1, 2))
    assert abs((sizes > 0).sum().item() - 150) < 45
    for hole, size in zip(holes[:, 0], sizes.tolist(), strict=True):
        if size:
            rows, columns = hole.any(1), hole.any(0)
            assert rows.sum() * columns.sum() == size, "not a rectangle"
            assert 0.1 * 400 * 0.75 <= size <= 0.3 * 400 * 1.25  # sides are rounded to pixels


def pillow_images(batch):
    image_module = pytest.importorskip("PIL.Image", reason="extra vision is not installed")
    return [image_module.fromarray((one.permute(1, 2, 0) * 255).round().byte().numpy()) for one in batch]


def assert_like_pillow(after, wanted, levels=1.01):
    for one, other in zip(after, wanted, strict=True):
        pixels = torch.from_numpy(np.array(other)).permute(2, 0, 1).float()
        assert (one * 255 - pixels).abs().max() <= levels  # Pillow rounds to whole levels


@pytest.mark.parametrize("factor", [0.1, 0.7, 1.0, 1.9])
@pytest.mark.parametrize(
    ("change", "enhancer"),
    [
        (color.brightness, "Brightness"),
        (color.contrast, "Contrast"),
        (color.saturation, "Color"),
        (color.sharpness, "Sharpness"),
    ],
)
def test_enhancements_equal_pillow(change, enhancer, factor):
    before = images(batch=4)
    wanted = pillow_images(before)
    from PIL import ImageEnhance

    wanted = [getattr(ImageEnhance, enhancer)(image).enhance(factor) for image in wanted]
    assert_like_pillow(change(before, torch.full((4,), factor)), wanted, levels=2.01)


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_posterize_equals_pillow(bits):
    before = images(batch=4)
    wanted = pillow_images(before)
    from PIL import ImageOps

    assert_like_pillow(
        color.posterize(before, torch.full((4,), float(bits))),
        [ImageOps.posterize(image, bits) for image in wanted],
        0.01,
    )


def test_other_tones_equal_pillow():
    before = images(batch=4, height=40, width=40) * torch.tensor([1, 0.5, 0.2, 0.9])[:, None, None, None]
    before = (before * 255).round() / 255
    wanted = pillow_images(before)
    from PIL import ImageOps

    assert_like_pillow(color.equalize(before), [ImageOps.equalize(image) for image in wanted], 0.01)
    assert_like_pillow(color.autocontrast(before), [ImageOps.autocontrast(image) for image in wanted])
    # Pillow inverts from the threshold on, we above it
    solarized = color.solarize(before, torch.full((4,), 99.5 / 255))
    assert_like_pillow(solarized, [ImageOps.solarize(image, 100) for image in wanted], 0.01)


def test_tones_of_a_constant_image():
    flat = torch.full((2, 3, 8, 8), 0.4)
    for change in (color.autocontrast, color.equalize):
        torch.testing.assert_close(change(flat), flat, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_acts_on_its_own_images_only(name):
    before = images(batch=6, height=30, width=30) * 0.8
    number = OPERATIONS.index(name)
    chosen = torch.tensor([True, False] * 3)
    numbers = torch.where(chosen, number, 0)
    half = torch.full((6,), 0.5, dtype=torch.float64)
    after = apply_operations(before, numbers, half, torch.ones(6, dtype=torch.float64), Ranges())
    assert torch.equal(after[~chosen], before[~chosen])
    changed = (after != before).flatten(1).any(1)
    assert changed[chosen].all() == (name != "identity")


def test_signs_go_both_ways():
    before = images(batch=1).expand(2, -1, -1, -1)
    for name in ("rotate", "translate_x", "brightness"):
        numbers = torch.full((2,), OPERATIONS.index(name))
        signs = torch.tensor([-1.0, 1.0], dtype=torch.float64)
        left, right = apply_operations(before, numbers, torch.full((2,), 0.5, dtype=torch.float64), signs, Ranges())
        assert not torch.allclose(left, right)


def test_trivial_augment_draws_operations_evenly():
    u = torch.from_numpy(uniforms(keys(range(4200)), 3, "trivial augment"))
    drawn = (u[:, 0] * len(OPERATIONS)).long()
    counts = torch.bincount(drawn, minlength=len(OPERATIONS))
    assert ((counts - 300) ** 2 / 300).sum() < 40  # chi-squared with 13 degrees of freedom


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomShift(pixels=-1), "pixels must not be negative, got -1"),
        (lambda: RandomErasing(area=(0.5, 0.2)), r"area must rise within 0..1, got \(0.5, 0.2\)"),
        (lambda: RandomErasing(max_aspect=0.5), "max_aspect must be at least 1, got 0.5"),
        (lambda: TrivialAugment(operations=("blur",)), r"operations must be some of identity, .*; got \['blur'\]"),
        (lambda: RandAugment(operations=()), "operations must be some of .* got none"),
        (lambda: RandAugment(magnitude=31.0), r"magnitude must be in 0..30, got 2 and 31.0"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
