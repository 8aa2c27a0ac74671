import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys, ShuffledBatches, stream
from tameformer.data.augment import HorizontalFlip, RandomShift, TrivialAugment
from tameformer.data.sources import ArraySource, array_source, npz_arrays
from tameformer.data.sources.arrays import channel_statistics
from tameformer.errors import DataError

RNG = np.random.default_rng(0)


def keys(indices):
    return SampleKeys(0, 0, np.asarray(indices, dtype=np.int64))


def pictures(size=20, shape=(3, 5, 4), dtype=np.uint8):
    images = RNG.integers(0, 256, (size, *shape)).astype(np.uint8)
    return images if dtype == np.uint8 else (images / 255).astype(dtype)


LABELS = np.arange(20) % 4


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_fetch_normalizes_by_channel(dtype):
    images = pictures(dtype=dtype)
    source = array_source(images, LABELS)
    batch = source.fetch(keys([4, 2, 2, 19]))
    for row, index in enumerate([4, 2, 2, 19]):
        for channel in range(3):
            value = images[index, channel].astype(np.float64) / (255 if dtype == np.uint8 else 1)
            wanted = (value - source.mean[channel]) / source.std[channel]
            np.testing.assert_allclose(batch["images"][row, channel].numpy(), wanted, atol=1e-5)
    assert batch["images"].dtype == torch.float32
    assert batch["labels"].tolist() == LABELS[[4, 2, 2, 19]].tolist()
    assert batch["num_items"] == 4
    whole = source.fetch(keys(range(20)))["images"]
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_equal_numpy(dtype):
    images = pictures(dtype=dtype)
    mean, std = channel_statistics(images)
    values = images.astype(np.float64) / (255 if dtype == np.uint8 else 1)
    np.testing.assert_allclose(mean, values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, values.std((0, 2, 3)), rtol=1e-12)
    assert channel_statistics(np.zeros((2, 1, 2, 2), dtype))[1] == (1.0,)


def test_usual_layouts_mean_the_same():
    first = pictures(shape=(3, 5, 4))
    last = np.ascontiguousarray(first.transpose(0, 2, 3, 1))
    assert np.array_equal(array_source(last, LABELS).images, first)
    grey = pictures(shape=(5, 4))
    assert np.array_equal(array_source(grey, LABELS).images, grey[:, None])
    assert array_source(first, LABELS[:, None].astype(np.uint8)).labels.dtype == np.int64


def test_parts_and_variants():
    source = array_source(pictures(), LABELS, class_names=["a", "b", "c", "d"])
    source = dataclasses.replace(source, transforms=(HorizontalFlip(),))
    rest, part = source.hold_out(0.4, seed=1)
    assert np.bincount(part.labels).tolist() == [2, 2, 2, 2]
    assert (part.transforms, rest.transforms) == ((), source.transforms)
    together = sorted(image.tobytes() for image in (*rest.images, *part.images))
    assert together == sorted(image.tobytes() for image in source.images)
    assert (part.mean, part.class_names) == (source.mean, source.class_names)
    assert not np.array_equal(source.hold_out(0.4, seed=2)[1].images, part.images)
    with pytest.raises(DataError, match=r"a part of 0.01 of 20 samples leaves 20 and 0; choose a fraction"):
        source.hold_out(0.01)
    with pytest.raises(ValueError, match=r"fraction must be at least 0 and below 1, got 1.5"):
        source.hold_out(1.5)


def test_a_fetch_is_cut_as_one_likes():
    source = dataclasses.replace(
        array_source(pictures(), LABELS), transforms=(TrivialAugment(), RandomShift(pixels=1), HorizontalFlip())
    )
    plan = ShuffledBatches(20, 8, 0)
    whole = [step[0]["images"] for step in stream(source, plan, start=0, stop=6)]
    for options in ({"accumulation": 4}, {"num_workers": 2}):
        steps = stream(source, plan, start=0, stop=6, **options)
        assert all(
            torch.equal(torch.cat([part["images"] for part in step]), images)
            for step, images in zip(steps, whole, strict=True)
        )


def test_a_source_survives_pickling_and_read_only_arrays():
    images = pictures()
    images.setflags(write=False)
    source = array_source(images, LABELS)
    copied = pickle.loads(pickle.dumps(source))
    assert torch.equal(source.fetch(keys([1]))["images"], copied.fetch(keys([1]))["images"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.0,)}, "mean needs one value per channel: expected 3, got 1"),
        ({"std": (1.0, 0.0, 1.0)}, r"std must be positive in every channel, got \(1.0, 0.0, 1.0\)"),
        ({"class_names": ("a",)}, "expected 4 class names, got 1"),
        (
            {"transforms": (HorizontalFlip(), HorizontalFlip())},
            r"its own salt, got \['horizontal flip'\] more than once",
        ),
    ],
)
def test_contradicting_settings_are_refused(change, message):
    source = array_source(pictures(), LABELS)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(source, **change)


def test_colour_operations_refuse_other_ranges():
    source = array_source(pictures(dtype=np.float32) * 3, LABELS)
    with pytest.raises(ValueError, match=r"TrivialAugment needs values in \[0, 1\], got 0 to 3"):
        dataclasses.replace(source, transforms=(TrivialAugment(),))


def with_value(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (pictures().astype(np.int64), LABELS, "images have dtype int64; expected uint8"),
        (pictures(shape=(5,)), LABELS, r"images have shape \(20, 5\); expected"),
        (pictures(shape=(5, 6, 7)), LABELS, r"shape \(20, 5, 6, 7\), where no axis of 1, 3 or 4"),
        (pictures(), LABELS[:-1], "20 images but 19 labels"),
        (pictures(), LABELS.astype(float), "labels have dtype float64; expected integers"),
        (pictures(), np.zeros((20, 4), int), r"labels have shape \(20, 4\); expected"),
        (pictures(), with_value(LABELS, 7, -1), "label -1 of sample 7 is outside 0..3"),
        (pictures(), with_value(LABELS, 7, 9), r"label 9 of sample 7 is outside 0..3 \(1 such"),
        (
            with_value(pictures(dtype=np.float32), (5, 0, 0, 0), np.nan),
            LABELS,
            "image 5 holds values that are not finite",
        ),
        (
            with_value(pictures(dtype=np.float32), (6, 0, 0, 0), np.inf),
            LABELS,
            "image 6 holds values that are not finite",
        ),
        (pictures(size=0), LABELS[:0], "no images"),
    ],
)
def test_bad_arrays_are_refused_by_file_and_field(images, labels, message, tmp_path):
    with pytest.raises(DataError, match=message):
        array_source(images, labels, num_classes=4)
    np.savez(tmp_path / "train.npz", x=images, y=labels)
    with pytest.raises(DataError, match=rf"train.npz \(images: field 'x', labels: field 'y'\): .*{message}"):
        npz_arrays(tmp_path, num_classes=4)


def test_npz_folder(tmp_path):
    train, test = pictures(), pictures()
    np.savez_compressed(tmp_path / "train.npz", x=train, y=LABELS, class_names=np.array(["a", "b", "c", "d"]))
    np.savez(tmp_path / "test.npz", images=test, labels=LABELS)
    source = npz_arrays(tmp_path)
    assert np.array_equal(source.images, train)
    assert source.class_names == ("a", "b", "c", "d")
    held = npz_arrays(tmp_path, "test", like=source)
    assert np.array_equal(held.images, test)
    assert (held.mean, held.std, held.class_names) == (source.mean, source.std, source.class_names)
    with pytest.raises(DataError, match=r"has no validation.npz \(found: test.npz, train.npz\)"):
        npz_arrays(tmp_path, "validation")


def test_one_archive_for_all_splits(tmp_path):
    file = tmp_path / "mnist.npz"
    train, test = pictures(shape=(5, 4)), pictures(shape=(5, 4))
    np.savez(file, x_train=train, y_train=LABELS, x_test=test, y_test=LABELS)
    assert np.array_equal(npz_arrays(file).images[:, 0], train)
    assert np.array_equal(npz_arrays(file, "test").images[:, 0], test)


def test_one_archive_with_one_split(tmp_path):
    file = tmp_path / "data.npz"
    np.savez(file, x=pictures(), y=LABELS)
    assert len(npz_arrays(file)) == 20
    with pytest.raises(
        DataError, match=r"has no split 'test': expected fields like x_test and y_test, got \['x', 'y'\]"
    ):
        npz_arrays(file, "test")


def test_test_images_must_be_like_the_training_images(tmp_path):
    np.savez(tmp_path / "train.npz", x=pictures(), y=LABELS)
    np.savez(tmp_path / "test.npz", x=pictures(shape=(3, 6, 6)), y=LABELS)
    source = npz_arrays(tmp_path)
    with pytest.raises(DataError, match=r"test.npz .*shape \(3, 6, 6\), those of .*train.npz .*\(3, 5, 4\)"):
        npz_arrays(tmp_path, "test", like=source)
    np.savez(tmp_path / "test.npz", x=pictures(), y=LABELS + 1)
    with pytest.raises(DataError, match=r"test.npz .*label 4 of sample 3 is outside 0..3"):
        npz_arrays(tmp_path, "test", like=source)


def single_array(path):
    np.save(path.with_suffix(".npy"), LABELS)
    path.with_suffix(".npy").rename(path)


def cut_short(path):
    np.savez(path, x=pictures(), y=LABELS)
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path):
    np.savez(path, x=pictures(), y=LABELS)
    raw = bytearray(path.read_bytes())
    raw[300:320] = bytes(20)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, r"has no train.npz \(found: no .npz file\)"),
        (lambda path: path.write_bytes(b""), r"train.npz is empty \(0 bytes\)"),
        (lambda path: path.write_bytes(b"hello"), "train.npz is not a numpy archive"),
        (lambda path: path.write_bytes(pickle.dumps({"x": 1})), "train.npz is not a numpy archive"),
        (single_array, "train.npz holds one array"),
        (cut_short, "train.npz is not a numpy archive"),
        (damaged, "train.npz: field 'x' is damaged"),
        (lambda path: np.savez(path, y=LABELS), r"train.npz has no field 'x' or 'images' or 'image'; it has \['y'\]"),
        (lambda path: np.savez(path, x=pictures()), "has no field 'y' or 'labels' or 'label'"),
        (
            lambda path: np.savez(path, x=np.array([object()]), y=LABELS),
            "field 'x' holds Python objects, which are never",
        ),
    ],
)
def test_bad_archives_are_refused(write, message, tmp_path):
    write(tmp_path / "train.npz")
    with pytest.raises(DataError, match=message):
        npz_arrays(tmp_path)


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist; give"):
        npz_arrays(tmp_path / "nowhere")


def encoded_images(shapes):
    image_module = pytest.importorskip("PIL.Image", reason="extra vision is not installed")
    images = [RNG.integers(0, 256, (*shape, 3)).astype(np.uint8) for shape in shapes]
    files = []
    for image in images:
        buffer = io.BytesIO()
        image_module.fromarray(image).save(buffer, "PNG")
        files.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8))
    return images, np.concatenate(files), np.cumsum([0, *map(len, files)])


def test_encoded_images_in_an_archive(tmp_path):
    images, encoded, offsets = encoded_images([(6, 5)] * 4)
    np.savez(tmp_path / "train.npz", jpeg=encoded, offsets=offsets, label=LABELS[:4].astype(np.uint8))
    source = npz_arrays(tmp_path)
    assert np.array_equal(source.images, np.stack(images).transpose(0, 3, 1, 2))
    assert source.labels.tolist() == [0, 1, 2, 3]


def test_bad_encoded_images_are_refused(tmp_path):
    _, encoded, offsets = encoded_images([(6, 5), (6, 5), (5, 6)])
    file = tmp_path / "train.npz"

    def refused(message, **arrays):
        np.savez(file, **{"jpeg": encoded, "offsets": offsets, "label": LABELS[: len(offsets) - 1], **arrays})
        with pytest.raises(DataError, match=message):
            npz_arrays(file)

    refused("image 2 is 6 x 5, image 0 is 5 x 6; resize")
    broken = encoded.copy()
    broken[offsets[1] : offsets[2]] = 0
    refused("train.npz: image 1 cannot be decoded", jpeg=broken)
    refused("offsets must rise within", offsets=offsets[::-1].copy())
    refused("offsets must rise within", offsets=offsets + 1)
    refused("expected one row of uint8 bytes", jpeg=encoded.astype(np.int32))
    refused("offsets are float64", offsets=offsets.astype(float))


def test_fashion_mnist(shared_data):
    source = npz_arrays(shared_data / "fashion_mnist", "test")
    assert source.image_shape == (1, 28, 28)
    assert np.bincount(source.labels).tolist() == [1000] * 10


def test_cifar10_small(shared_data):
    pytest.importorskip("PIL", reason="extra vision is not installed")
    source = npz_arrays(shared_data / "cifar10_small", "test")
    assert source.image_shape == (3, 32, 32)
    assert np.bincount(source.labels).tolist() == [200] * 10
    assert source.class_names[:2] == ("airplane", "automobile")


def test_a_source_wants_checked_arrays():
    with pytest.raises(DataError, match="expected int64"):
        ArraySource(pictures(), LABELS.astype(np.int32), mean=(0.0,) * 3, std=(1.0,) * 3, num_classes=4)
