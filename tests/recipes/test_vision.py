"""What the image recipe makes of its data section."""

import numpy as np
import pytest

from tameformer.data import SampleKeys
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
