import dataclasses

import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys, SequentialBatches, ShuffledBatches, single_pass, stream
from tameformer.data.augment import HorizontalFlip
from tameformer.data.sources import image_folder
from tameformer.errors import DataError

image_module = pytest.importorskip("PIL.Image", reason="extra vision is not installed")


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (8, 8, 3) if number else (8, 8)  # one grey image in each
                pixels = rng.integers(0, 256, shape).astype(np.uint8)
                image_module.fromarray(pixels).save(folder / f"{number}.png")
            (folder / "notes.txt").write_text("not an image")
    return tmp_path


def test_images_and_labels(root):
    source = image_folder(root, size=8)
    assert len(source) == 8
    assert source.class_names == ("cat", "dog")
    assert source.image_shape == (3, 8, 8)
    batch = source.fetch(SampleKeys(0, 0, np.array([5, 0])))
    assert batch["labels"].tolist() == [1, 0]
    for row, file in enumerate(("dog/1.png", "cat/0.png")):
        with image_module.open(root / "train" / file) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_allclose(batch["images"][row].numpy(), pixels / 127.5 - 1, atol=1e-6)
    assert len(image_folder(root, "test", size=8, like=source)) == 4


def test_sizes_are_made_equal_by_scaling_and_cropping(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = 200  # the middle square
    (tmp_path / "a").mkdir()
    image_module.fromarray(pixels).save(tmp_path / "a" / "wide.png")
    image_module.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "a" / "tall.png")
    source = image_folder(tmp_path, size=10, channels=1)
    images = source.fetch(SampleKeys(0, 0, np.array([0, 1])))["images"]
    inside = images[:, :, 1:-1, 1:-1]  # the filter mixes the edge with what lies beyond it
    assert torch.allclose(inside, torch.full((2, 1, 8, 8), 200 / 127.5 - 1), atol=1e-6)
    assert torch.equal(images[0], images[1].transpose(1, 2))


def test_workers_decode_the_same(root):
    source = dataclasses.replace(image_folder(root, size=6), transforms=(HorizontalFlip(),))
    plan = ShuffledBatches(8, 4, 0)
    here, there = (list(stream(source, plan, start=0, stop=6, num_workers=workers)) for workers in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one[0]["images"], other[0]["images"])


def test_hold_out(root):
    rest, part = image_folder(root, size=6).hold_out(0.25)
    assert np.bincount(part.labels).tolist() == [1, 1]
    assert sorted([*rest.positions, *part.positions]) == list(range(8))
    first = part.fetch(SampleKeys(0, 0, np.array([0])))["images"]
    whole = image_folder(root, size=6).fetch(SampleKeys(0, 0, part.positions[:1]))["images"]
    assert torch.equal(first, whole)
    with pytest.raises(DataError, match="no images"):
        rest.hold_out(0.01)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_file_is_named(root, workers):
    (root / "train" / "dog" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    source = image_folder(root, size=8)
    with pytest.raises(DataError, match=r"dog.2.png cannot be decoded as an image: .*; repair or remove it"):
        list(single_pass(source, SequentialBatches(8, 4), num_workers=workers))


def test_a_file_cut_short_is_named(root):
    file = root / "train" / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:80])
    with pytest.raises(DataError, match=r"cat.3.png cannot be decoded"):
        list(single_pass(image_folder(root, size=8), SequentialBatches(8, 4)))


def test_bad_folders_are_refused(root, tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        image_folder(root / "nowhere", size=8)
    with pytest.raises(DataError, match=r"has no folder 'validation' \(found: test, train\)"):
        image_folder(root, "validation", size=8)
    source = image_folder(root, size=8)
    (root / "test" / "emu").mkdir()
    with pytest.raises(DataError, match=r"has the class 'emu', which .*train has not"):
        image_folder(root, "test", size=8, like=source)
    (root / "train" / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu holds no images"):
        image_folder(root, size=8)
    (root / "bare").mkdir()
    with pytest.raises(DataError, match=r"bare has no folders; expected one folder per class"):
        image_folder(root / "bare", size=8)


def test_settings_are_checked(root):
    with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
        image_folder(root, size=0)
    with pytest.raises(ValueError, match="channels must be 1, 3 or 4, got 2"):
        image_folder(root, size=8, channels=2)
