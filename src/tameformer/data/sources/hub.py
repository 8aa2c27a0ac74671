"""Hugging Face `datasets` (extra `data`) of labelled images, from a folder of `save_to_disk` or by hub name."""

import contextlib
import importlib
import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tameformer.data.sources.decoded import DecodedImages
from tameformer.data.sources.pixels import pillow
from tameformer.errors import DataError, missing_extra

_IMAGES = ("image", "img", "images", "pixel_values")
_LABELS = ("label", "labels", "fine_label", "class")
_PATIENCE = 1.0  # seconds to wait for the hub before giving up; its own client retries for half a minute


def hub_images(
    name: str, split: str = "train", *, size: int, channels: int = 3, like: DecodedImages | None = None
) -> DecodedImages:
    """One split of a data set with an image column and a label column.

    Args:
        name: folder written by `save_to_disk`, or a name on the hub such as `uoft-cs/cifar10`.
        split: name of the split.
        size: side of the square that images are scaled and centre-cropped to, in pixels.
        channels: 1 for grey, 3 for RGB.
        like: the training split, whose classes hold for this one too.

    Raises:
        DataError: no such data set, split or column, labels that are not class numbers, or a hub that does not answer
            (told within two seconds; what was downloaded before is used without a network).
    """
    pillow()
    rows = _load(name, split)
    images, labels = _column(rows, _IMAGES, name), _column(rows, _LABELS, name)
    numbers = np.asarray(rows[labels])
    if numbers.dtype.kind not in "iu":
        raise DataError(
            f"{name}: column {labels!r} of split {split!r} holds {numbers.dtype}, not class numbers; "
            f"encode it with dataset.class_encode_column({labels!r}) and save_to_disk"
        )
    names = like.class_names if like else tuple(getattr(rows.features[labels], "names", None) or ())
    num_classes = like.num_classes if like else len(names) or int(numbers.max(initial=0)) + 1
    return DecodedImages(
        images=_Column(rows, images),
        positions=np.arange(len(rows), dtype=np.int64),
        labels=numbers.astype(np.int64),
        size=size,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        num_classes=num_classes,
        class_names=names,
        name=f"{name}, split {split}",
    )


class _Column(Sequence):
    """One column of a data set by row."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows = rows.select_columns([column])
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: Any) -> Any:
        return self.rows[row][self.column]


def _load(name: str, split: str) -> Any:
    if Path(name).is_dir():
        parts = _import("datasets").load_from_disk(name)
        if not isinstance(parts, dict):
            if split != "train":
                raise DataError(f"{name} holds one split; save a DatasetDict that has {split!r} too")
            return parts
        if split not in parts:
            raise DataError(f"{name} has no split {split!r}; it has {sorted(parts)}")
        return parts[split]
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name):
        raise DataError(f"{name} is neither a folder nor a name on the hub (owner/name); correct the path")
    online = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("", "0", "false", "no", "off") and hub_answers(_PATIENCE)
    if not online and not _in_cache(name):
        raise DataError(
            f"{name} is no folder here, has not been downloaded before, and the hub cannot be reached (or HF_HUB_OFFLINE "
            "is set); connect, or download it elsewhere, write it with save_to_disk, and give that folder"
        )
    datasets = _import("datasets")
    with contextlib.nullcontext() if online else _offline(datasets):
        try:
            return datasets.load_dataset(name, split=split)
        except (OSError, ValueError) as error:
            raise DataError(f"{name}, split {split!r}, cannot be loaded: {error}") from error


def hub_answers(patience: float) -> bool:
    """Whether a connection to the hub, or to the proxy in front of it, opens within `patience` seconds."""
    address = urlsplit(
        os.environ.get("https_proxy")
        or os.environ.get("HTTPS_PROXY")
        or os.environ.get("HF_ENDPOINT")
        or "https://huggingface.co"
    )
    opened = threading.Event()

    def knock() -> None:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(
                (address.hostname or "", address.port or (80 if address.scheme == "http" else 443)), timeout=patience
            ),
        ):
            opened.set()

    knocking = threading.Thread(target=knock, daemon=True)  # a name server may hang, whatever the timeout
    knocking.start()
    knocking.join(patience)
    return opened.is_set()


def _in_cache(name: str) -> bool:
    """Whether `datasets` may have a copy; it writes owner___name, in snake case."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(home) / "datasets")
    wanted = re.sub(r"[\W_]", "", name).lower()
    return cache.is_dir() and any(re.sub(r"[\W_]", "", entry.name).lower() == wanted for entry in cache.iterdir())


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Keep the client from retrying: the environment is read at its import, so the values read are changed."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise missing_extra(package, "data") from None


def _column(rows: Any, wanted: tuple[str, ...], name: str) -> str:
    for column in wanted:
        if column in rows.column_names:
            return column
    raise DataError(
        f"{name} has no column {' or '.join(map(repr, wanted))}; it has {rows.column_names}: "
        "rename the one that is meant with rename_column and save_to_disk"
    )
