"""What the image recipe makes of its data section."""

import numpy as np
import pytest

from tameformer.data import SampleKeys
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.vision import VisionDataConfig, sources


@pytest.fixture
def folder(tmp_path):
    """Grey images of 28 x 28 that are black but for one pixel in the middle."""
    images = np.zeros((64, 28, 28), dtype=np.uint8)
    images[:, 14, 14] = 255
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", x=images, y=np.arange(64) % 2)
    return tmp_path


@pytest.mark.parametrize(("shift_pixels", "furthest"), [(None, 3), (1, 1), (5, 5)])
def test_shift_moves_up_to_its_pixels(folder, shift_pixels, furthest):
    data = VisionDataConfig(source="npz", path=str(folder), augment=("shift",), shift_pixels=shift_pixels)
    train, held_out = sources(data, 0)
    moves = []
    for epoch in range(4):
        images = train.fetch(SampleKeys(indices=np.arange(64), seed=0, epoch=epoch))["images"]
        _, _, rows, columns = (images == images.amax()).nonzero(as_tuple=True)
        moves += [(rows - 14), (columns - 14)]
    assert {int(move.min()) for move in moves} == {-furthest}
    assert {int(move.max()) for move in moves} == {furthest}
    kept = held_out.fetch(SampleKeys(indices=np.arange(64), seed=0, epoch=0))["images"]
    assert (kept[:, 0, 14, 14] == kept.amax()).all()


def test_a_shift_of_no_pixels_is_refused():
    with pytest.raises(
        ValueError, match=r"data\.shift_pixels must be at least 1, got 0; leave shift out of data\.augment"
    ):
        VisionDataConfig(augment=("shift",), shift_pixels=0)


@pytest.mark.parametrize("key", ["data.mixup_alpha", "data.cutmix_alpha"])
def test_mixing_reaches_the_batches_of_training(key, tmp_path):
    found = resolve("vit-digits", {key: 1.0, "max_steps": 1, "optim.warmup_steps": 0})
    run, plain = (
        resolve("vit-digits").build(config, tmp_path) for config in (found.config, resolve("vit-digits").config)
    )
    (mixed,), (batch,) = (next(iter(one.batches(start=0, stop=1, rank=0, world_size=1))) for one in (run, plain))
    labels = mixed["labels"]
    assert ((labels > 0).sum(1) > 1).float().mean() > 0.5  # of two digits, unless both are the same
    np.testing.assert_allclose(labels.sum(1), 1.0, rtol=1e-6)
    kept = (
        (mixed["images"] == batch["images"]).float().mean()
    )  # CutMix leaves most pixels, mixup none but the black ones
    assert (kept > 0.5) == (key == "data.cutmix_alpha")
