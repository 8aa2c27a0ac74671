import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tameformer.data import SampleKeys
from tameformer.data.sources import digits


def everything(source):
    return source.fetch(SampleKeys(0, 0, np.arange(len(source))))


def as_rows(source):
    return [(int(label), image.tobytes()) for image, label in zip(source.images, source.labels, strict=True)]


def test_train_and_test_make_up_the_data():
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    data = load_digits()
    whole = [
        (int(label), (image / 16).astype(np.float32).tobytes())
        for image, label in zip(data.images, data.target, strict=True)
    ]
    assert sorted(as_rows(train) + as_rows(test)) == sorted(whole)
    assert np.bincount(test.labels).tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]


def test_values_are_normalized_by_the_training_split():
    train, test = digits("train"), digits("test")
    images = everything(train)["images"]
    assert images.shape == (1437, 1, 8, 8)
    assert images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (test.mean, test.std) == (train.mean, train.std)
    assert everything(test)["images"].std().item() != pytest.approx(1, abs=1e-6)


def test_validation_is_cut_from_train_by_seed():
    part, rest = (digits(split, seed=5, validation_fraction=0.2) for split in ("validation", "train"))
    assert len(part) == 287
    assert sorted(as_rows(part) + as_rows(rest)) == sorted(as_rows(digits("train")))
    assert as_rows(digits("validation", seed=6, validation_fraction=0.2)) != as_rows(part)
    assert as_rows(digits("test", seed=6)) == as_rows(digits("test"))


def test_batch():
    source = digits("train")
    batch = source.fetch(SampleKeys(0, 0, np.array([3, 1], dtype=np.int64)))
    assert batch["labels"].tolist() == source.labels[[3, 1]].tolist()
    assert batch["labels"].dtype == torch.int64
    assert batch["num_items"] == 2
    assert source.image_shape == (1, 8, 8)
    assert source.num_classes == 10


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be train, validation or test, got 'dev'"):
        digits("dev")
