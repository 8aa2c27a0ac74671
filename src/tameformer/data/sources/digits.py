"""The embedded data: scikit-learn's 1,797 handwritten digits, 8 x 8 grey levels in 0..16 (Alpaydin and Kaynak 1998)."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from tameformer.data.sources.arrays import ArraySource, array_source
from tameformer.data.sources.images import stratified_split

NUM_TEST = 360
"""Test images, the same ones for every seed."""


def digits(split: str, *, seed: int = 0, validation_fraction: float = 0.0) -> ArraySource:
    """One split, normalized by the statistics of all 1,437 images that are not test images.

    Args:
        split: `train`, `validation` or `test`. The test split is 360 images, stratified, chosen once and for all; the
            others share the remaining 1,437.
        seed: chooses the validation images.
        validation_fraction: part of the remaining images that becomes `validation`, stratified, in [0, 1).

    Example:
        >>> len(digits("train")), len(digits("test"))
        (1437, 360)
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split must be train, validation or test, got {split!r}")
    rows = _rows()
    images = (rows[:, :64] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    labels = rows[:, 64].astype(np.int64)
    kept, held = stratified_split(labels, NUM_TEST / len(labels), seed=0)
    names = [str(digit) for digit in range(10)]
    train = array_source(images[kept], labels[kept], class_names=names, name="digits")
    if split == "test":
        return array_source(images[held], labels[held], like=train, name="digits test split")
    if validation_fraction == 0 and split == "train":
        return train
    rest, part = train.hold_out(validation_fraction, seed=seed)
    return rest if split == "train" else part


def _rows() -> np.ndarray:
    """64 grey levels and the label of every image: from scikit-learn's own file, whose import takes two seconds."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            with gzip.open(file, "rt", encoding="ascii") as lines:
                return np.loadtxt(lines, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits  # another version may keep the file elsewhere

    pixels, target = load_digits(return_X_y=True)
    return np.column_stack([pixels, target]).astype(np.int64)
