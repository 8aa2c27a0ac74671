"""Labelled images in numpy archives; nothing in them is ever unpickled."""

import lzma
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tameformer.data.sources.arrays import ArraySource, array_source
from tameformer.data.sources.pixels import decode_all
from tameformer.errors import DataError

_IMAGES = ("x", "images", "image")
_LABELS = ("y", "labels", "label")


def npz_arrays(
    path: str | Path, split: str = "train", *, like: ArraySource | None = None, num_classes: int | None = None
) -> ArraySource:
    """One split of a folder with `train.npz`, `test.npz`, ..., or of one archive.

    An archive holds images as `x`, `images` or `image` and class numbers as `y`, `labels` or `label`; one archive for
    all splits has `x_train`, `y_train`, `x_test`, ... instead. In place of images, `jpeg` and `offsets` hold encoded
    files: image i is `jpeg[offsets[i]:offsets[i + 1]]`, decoded once, here. `class_names` is optional.

    Args:
        path: folder or archive.
        split: name of the split.
        like: the training split, whose mean, std, classes and names hold for this one too.
        num_classes: classes of the task; by default those of `like`, else the largest label plus one.

    Raises:
        DataError: the file, field or value that is wrong, and the remedy.
    """
    file = _archive_path(Path(path), split)
    with opened(file) as archive:
        fields = set(archive.files)
        suffix = f"_{split}" if any(f"{field}_{split}" in fields for field in _IMAGES) else ""
        if not suffix and Path(path).is_file() and split != "train":
            raise DataError(
                f"{file} has no split {split!r}: expected fields like x_{split} and y_{split}, got {sorted(fields)}; "
                f"or give a folder that holds train.npz and {split}.npz"
            )
        labels_field = _field(fields, _LABELS, suffix, file)
        if not suffix and {"jpeg", "offsets"} <= fields:
            images_field = "jpeg"
            images = decode_all(read_field(archive, "jpeg", file), read_field(archive, "offsets", file), name=str(file))
        else:
            images_field = _field(fields, _IMAGES, suffix, file)
            images = read_field(archive, images_field, file)
        labels = read_field(archive, labels_field, file)
        names = read_field(archive, "class_names", file).tolist() if "class_names" in fields and like is None else ()
    return array_source(
        images,
        labels,
        like=like,
        num_classes=num_classes,
        class_names=[str(name) for name in names],
        name=f"{file} (images: field {images_field!r}, labels: field {labels_field!r})",
    )


def _archive_path(path: Path, split: str) -> Path:
    if not path.exists():
        raise DataError(f"{path} does not exist; give a .npz file or a folder with train.npz and test.npz")
    if path.is_file():
        return path
    file = path / f"{split}.npz"
    if not file.is_file():
        found = sorted(other.name for other in path.glob("*.npz"))
        raise DataError(f"{path} has no {file.name} (found: {', '.join(found) or 'no .npz file'}); add it")
    return file


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """The archive, closed afterwards, also when it is none: numpy leaves such a file open."""
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes); write it again")
    with file.open("rb") as handle:
        try:
            archive = np.load(handle, allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is not a numpy archive ({error}); write it with numpy.savez") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise DataError(f"{file} holds one array, not an archive; write it with numpy.savez(path, x=..., y=...)")
        yield archive


def _field(fields: set[str], wanted: Sequence[str], suffix: str, file: Path) -> str:
    names = [name + suffix for name in wanted]
    for name in names:
        if name in fields:
            return name
    raise DataError(
        f"{file} has no field {' or '.join(map(repr, names))}; it has {sorted(fields)}: rename the field that is meant"
    )


def read_field(archive: Any, field: str, file: Path) -> np.ndarray:
    """One array, decompressed once."""
    try:
        return archive[field]
    except ValueError as error:
        if "allow_pickle" in str(error):
            message = "holds Python objects, which are never unpickled: save it as a plain array of numbers"
        else:
            message = f"cannot be read: {error}; write the file again"
        raise DataError(f"{file}: field {field!r} {message}") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{file}: field {field!r} is damaged: {error}; write the file again") from error
