import dataclasses

import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys, ShuffledBatches, stream, uniforms
from tameformer.data.augment import MixedSource, RandomShift, cutmix, mixup, soft_labels
from tameformer.data.sources import array_source


def source(size=30, transforms=()):
    images = np.random.default_rng(0).random((size, 3, 8, 6)).astype(np.float32)
    return dataclasses.replace(array_source(images, np.arange(size) % 5), transforms=transforms)


def keys(indices, seed=0, epoch=0):
    return SampleKeys(seed, epoch, np.asarray(indices, dtype=np.int64))


def test_mixup_is_a_weighted_sum():
    one, other = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 1, 4, 4)
    weight = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    mixed = mixup(one, other, weight)
    for sample in range(3):
        share = float(weight[sample])
        torch.testing.assert_close(mixed[sample], share * one[sample] + (1 - share) * other[sample])


def test_cutmix_pastes_a_rectangle_and_tells_its_share():
    one, other = torch.zeros(200, 2, 10, 20), torch.ones(200, 2, 10, 20)
    u = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed, weight = cutmix(one, other, u[:, 0], u[:, 1:])
    torch.testing.assert_close(1 - mixed.mean((1, 2, 3)).double(), weight)
    for image in mixed[:, 0]:
        assert image.any(1).sum() * image.any(0).sum() == image.sum()
    whole = cutmix(one[:2], other[:2], torch.tensor([0.0, 1.0], dtype=torch.float64), torch.full((2, 2), 0.5).double())
    assert (whole[0][0] == 1).all()
    assert (whole[0][1] == 0).all()
    assert whole[1].tolist() == [0.0, 1.0]


def test_soft_labels():
    labels = soft_labels(torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0.75, 0.3]), 4)
    torch.testing.assert_close(labels, torch.tensor([[0.75, 0, 0.25, 0], [0, 1.0, 0, 0]]))


@pytest.mark.parametrize(
    "alphas", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}]
)
def test_a_mixed_batch_is_cut_as_one_likes(alphas):
    mixed = MixedSource(source(transforms=(RandomShift(pixels=1),)), **alphas)
    plan = ShuffledBatches(30, 12, 3)
    whole = [step[0] for step in stream(mixed, plan, start=0, stop=4)]
    for options in ({"accumulation": 4}, {"accumulation": 12}, {"num_workers": 2}):
        for step, batch in zip(stream(mixed, plan, start=0, stop=4, **options), whole, strict=True):
            assert torch.equal(torch.cat([part["images"] for part in step]), batch["images"])
            assert torch.equal(torch.cat([part["labels"] for part in step]), batch["labels"])
    assert whole[0]["num_items"] == 12
    assert not torch.equal(whole[0]["images"], mixed.source.fetch(plan.batch(0))["images"])


def test_partners_and_weights_are_what_the_labels_say():
    plain = source()
    mixed = MixedSource(plain, mixup_alpha=1.0)
    asked = keys(range(30), seed=4, epoch=2)
    batch, own = mixed.fetch(asked), plain.fetch(asked)
    u = uniforms(asked, 6, "mixed source")
    for sample in range(30):
        others = [other for other in range(30) if other != sample]
        partner = others[int(u[sample, 0] * 29)]
        weight = u[sample, 3]  # Beta(1, 1) is uniform
        wanted = weight * own["images"][sample] + (1 - weight) * own["images"][partner]
        torch.testing.assert_close(batch["images"][sample], wanted.float())
        label = torch.zeros(5)
        label[sample % 5] += weight
        label[partner % 5] += 1 - weight
        torch.testing.assert_close(batch["labels"][sample], label)


def test_both_methods_share_the_samples_and_labels_tell_the_pixels():
    # Sample i is the constant i, so every pixel says where it comes from.
    images = np.arange(40, dtype=np.float32)[:, None, None, None] * np.ones((1, 1, 8, 6), np.float32)
    plain = array_source(images, np.arange(40))
    plain = dataclasses.replace(plain, mean=(0.0,), std=(1.0,))
    batch = MixedSource(plain, mixup_alpha=1.0, cutmix_alpha=1.0).fetch(keys(range(40)))
    pasted = 0
    for sample, (image, label) in enumerate(zip(batch["images"], batch["labels"], strict=True)):
        values = image.unique()
        torch.testing.assert_close(image.mean(), (label * torch.arange(40)).sum(), atol=1e-3, rtol=1e-4)
        if len(values) == 2:  # CutMix keeps pixels as they are
            pasted += 1
            torch.testing.assert_close(label[sample], (image == sample).float().mean())
    assert 8 <= pasted <= 32


def test_weights_follow_the_beta_distribution():
    mixed = MixedSource(source(4000), mixup_alpha=0.4)
    labels = mixed.fetch(keys(range(4000)))["labels"]
    weight = labels[torch.arange(4000), torch.arange(4000) % 5]
    partner_differs = labels.max(1).values < 1
    shares = weight[partner_differs]
    # Beta(0.4, 0.4): mean 1/2, variance 1 / (4 (2 * 0.4 + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.8), abs=0.015)


@pytest.mark.parametrize("settings", [{}, {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "probability": 0.0}])
def test_nothing_to_mix_leaves_images_and_hard_labels(settings):
    plain = source()
    batch = MixedSource(plain, **settings).fetch(keys(range(10)))
    assert torch.equal(batch["images"], plain.fetch(keys(range(10)))["images"])
    assert torch.equal(batch["labels"], torch.eye(5)[torch.arange(10) % 5])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="alphas must not be negative, got -1"):
        MixedSource(source(), mixup_alpha=-1.0)
    with pytest.raises(ValueError, match=r"probability must be in 0..1, got 2"):
        MixedSource(source(), probability=2.0)
    with pytest.raises(ValueError, match="mixing needs at least 2 samples, got 1"):
        MixedSource(source(1), mixup_alpha=1.0)
