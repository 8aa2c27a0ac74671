import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data import SampleKeys
from tameformer.data.patch_masks import MaskedPatches, visible_patches
from tameformer.data.sources import digits


@given(st.integers(2, 60), st.integers(0, 2**31), st.integers(0, 50))
def test_a_mask_is_a_draw_without_replacement_that_belongs_to_the_sample(num_patches, seed, epoch):
    num_visible = max(1, num_patches // 4)
    keys = SampleKeys(seed, epoch, np.array([5, 900, 5]))
    seen = visible_patches(keys, num_patches, num_visible)
    assert (np.diff(seen, axis=1) > 0).all()
    assert seen.min() >= 0
    assert seen.max() < num_patches
    assert np.array_equal(seen[0], seen[2])
    alone = visible_patches(SampleKeys(seed, epoch, np.array([900])), num_patches, num_visible)
    assert np.array_equal(alone[0], seen[1])


def test_every_patch_is_seen_equally_often_and_anew_each_epoch():
    first, second = (visible_patches(SampleKeys(0, epoch, np.arange(4000)), 16, 4) for epoch in (0, 1))
    share = np.bincount(first.ravel(), minlength=16) / 4000
    np.testing.assert_allclose(share, 0.25, atol=0.03)  # four standard errors
    assert (first != second).any(axis=1).mean() > 0.99


def test_batches_are_those_of_the_source_with_what_is_seen():
    source, keys = digits("train"), SampleKeys(3, 1, np.arange(4))
    masked = MaskedPatches(source, 16, 0.75)
    assert len(masked) == len(source)
    batch = masked.fetch(keys)
    assert torch.equal(batch["images"], source.fetch(keys)["images"])
    assert batch["visible"].shape == (4, 4)


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.99, 1.0, -1.0])
def test_a_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match=r"of 16 patches to see; choose one that leaves some"):
        MaskedPatches(digits("train"), 16, ratio)
