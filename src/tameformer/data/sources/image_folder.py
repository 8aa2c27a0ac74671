"""A folder per class, images inside: `root/train/cat/001.jpg`, or `root/cat/001.jpg` where there is one split."""

from pathlib import Path

import numpy as np

from tameformer.data.sources.decoded import DecodedImages
from tameformer.data.sources.pixels import pillow
from tameformer.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Endings of files that count as images, in lower case; other files are left alone."""


def image_folder(
    path: str | Path, split: str = "train", *, size: int, channels: int = 3, like: DecodedImages | None = None
) -> DecodedImages:
    """One split, classes numbered in the order of their sorted folder names.

    Args:
        path: folder of splits, or of classes when `split` is `train` and there is no folder of that name.
        split: folder of the split.
        size: side of the square that images are scaled and centre-cropped to, in pixels.
        channels: 1 for grey, 3 for RGB.
        like: the training split; this one must have no class that is not in it.

    Raises:
        DataError: a missing folder, no classes, a class without images, or a class that `like` does not have.
    """
    pillow()  # say at once what to install
    root = _split_folder(Path(path), split)
    found = sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    if not found:
        raise DataError(f"{root} has no folders; expected one folder per class with its images inside")
    classes = like.class_names if like else tuple(found)
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise DataError(f"{root} has the class {unknown[0]!r}, which {like and like.name} has not; add it there")
    files: list[str] = []
    labels: list[int] = []
    for name in found:
        of_class = sorted(str(file) for file in (root / name).rglob("*") if file.suffix.lower() in SUFFIXES)
        if not of_class:
            raise DataError(f"{root / name} holds no images ({', '.join(sorted(SUFFIXES))}); fill or remove the folder")
        files += of_class
        labels += [classes.index(name)] * len(of_class)
    return DecodedImages(
        images=files,
        positions=np.arange(len(files), dtype=np.int64),
        labels=np.asarray(labels, dtype=np.int64),
        size=size,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        num_classes=len(classes),
        class_names=classes,
        name=str(root),
    )


def _split_folder(path: Path, split: str) -> Path:
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; give one that holds a folder per split, or per class")
    if (path / split).is_dir():
        return path / split
    if split != "train":
        found = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        raise DataError(f"{path} has no folder {split!r} (found: {', '.join(found[:10]) or 'none'}); add it")
    return path
