import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys
from tameformer.data.augment import ColorJitter, RandomResizedCrop
from tameformer.data.augment.color import brightness, contrast
from tameformer.data.sources import array_source, digits
from tameformer.data.sources.images import Transform, augment
from tameformer.data.views import TwoViews


def with_views(*transforms):
    source = digits("train")
    return TwoViews(type(source)(**{**vars_of(source), "transforms": transforms}))


def vars_of(source):
    names = ("images", "labels", "mean", "std", "num_classes", "class_names", "transforms", "name")
    return {name: getattr(source, name) for name in names}


def test_views_differ_by_their_own_numbers_and_belong_to_the_sample():
    source, keys = with_views(RandomResizedCrop()), SampleKeys(0, 2, np.array([4, 7, 4]))
    batch = source.fetch(keys)
    first, second = batch["images"].chunk(2)
    assert batch["num_items"] == 3
    assert torch.equal(first, source.source.fetch(keys)["images"])
    assert not torch.equal(first, second)
    assert torch.equal(second[0], second[2])
    alone = source.fetch(SampleKeys(0, 2, np.array([7])))["images"]
    assert torch.equal(alone[1], second[1])
    assert not torch.equal(source.fetch(SampleKeys(0, 3, keys.indices))["images"][3:], second)
    with pytest.raises(ValueError, match=r"two views need augmentations, and data\.augment is empty"):
        with_views()


def ramp(height=8, width=8):
    return (torch.arange(width, dtype=torch.float32) / (width - 1)).expand(1, 1, height, width).clone()


def test_a_crop_is_the_enlarged_part_and_stays_inside():
    crop = RandomResizedCrop(smallest=0.25, ratio=1.0)
    assert isinstance(crop, Transform)
    # Half the side, at the left edge: twice as flat; from output pixel j comes (j + 0.5) / 2 - 0.5, cut at the border.
    u = torch.tensor([[0.0, 0.5, 0.0, 0.5]], dtype=torch.float64)
    expected = ((torch.arange(8) + 0.5) / 2 - 0.5) / 7
    got = crop(ramp(), u)[0, 0]
    torch.testing.assert_close(got[:, 1:], expected[1:].expand(8, -1))
    whole = crop(ramp(), torch.tensor([[1.0, 0.5, 0.3, 0.9]], dtype=torch.float64))
    torch.testing.assert_close(whole, ramp(), atol=1e-5, rtol=0)
    ones = torch.ones(200, 1, 9, 6)
    u = torch.rand(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cropped = RandomResizedCrop(smallest=0.1, ratio=2.0)(ones, u)
    assert (cropped[:, :, 1:-1, 1:-1] > 0.999).all()  # nothing black comes in from outside


def test_jitter_is_brightness_contrast_and_sometimes_grey():
    images = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    u = torch.tensor([[0.5, 0.5, 0.5, 0.9], [1.0, 0.5, 0.5, 0.0], [0.5, 0.0, 0.5, 0.0]], dtype=torch.float64)
    got = ColorJitter(strength=0.4)(images, u)
    torch.testing.assert_close(got[0], images[0])
    torch.testing.assert_close(got[1:2], brightness(images[1:2], torch.tensor([1.4])))
    torch.testing.assert_close(got[2:], contrast(images[2:], torch.tensor([0.6])))
    colored = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    first, second = ColorJitter(strength=0.0)(colored, u[:2])
    torch.testing.assert_close(first, colored[0])
    assert torch.equal(second[0], second[1])
    bright = array_source(np.full((4, 2, 2), 3.0, dtype=np.float32), np.arange(4))
    with pytest.raises(ValueError, match="ColorJitter needs values in"):
        type(bright)(**{**vars_of(bright), "transforms": (ColorJitter(),)})


def test_new_transforms_draw_by_sample():
    images, keys = torch.rand(2, 1, 8, 8), SampleKeys(1, 0, np.array([3, 3]))
    got = augment(images[:1].expand(2, -1, -1, -1), keys, (RandomResizedCrop(), ColorJitter()))
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("wrong", [{"smallest": 0.0}, {"ratio": 0.5}])
def test_a_crop_of_nothing_is_refused(wrong):
    with pytest.raises(ValueError, match="expected 0 < smallest <= 1 <= ratio"):
        RandomResizedCrop(**wrong)
