"""Decoding and resizing through Pillow (extra `vision`)."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tameformer.errors import DataError, missing_extra


def decode(encoded: Any, *, channels: int, size: int | None, name: str) -> np.ndarray:
    """Pixels of one image, uint8, shape (channels, height, width).

    Args:
        encoded: a path, the bytes of a file, a Pillow image, an array (height, width[, channels]), or the
            `{"bytes": ..., "path": ...}` of Hugging Face `datasets`.
        channels: 1 for grey, 3 for RGB, 4 for RGBA; images of other kinds are converted.
        size: side of the square that the image is scaled and centre-cropped to, in pixels; None keeps it as it is.
        name: what errors call the image.

    Raises:
        DataError: it cannot be decoded.
    """
    image_module = pillow()
    if isinstance(encoded, dict):
        encoded = encoded.get("bytes") or encoded.get("path")
    try:
        if isinstance(encoded, str | Path):
            encoded = Path(encoded).read_bytes()  # Pillow leaves a file open when it fails
        if isinstance(encoded, np.ndarray | list):
            image = image_module.fromarray(np.asarray(encoded, dtype=np.uint8))
        elif isinstance(encoded, image_module.Image):
            image = encoded
        elif isinstance(encoded, bytes):
            image = image_module.open(io.BytesIO(encoded))
        else:
            raise TypeError(f"it is a {type(encoded).__name__}")
        image = image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
    except (OSError, SyntaxError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{name} cannot be decoded as an image: {error}; repair or remove it") from error
    if size is not None and image.size != (size, size):
        image = _fitted(image, size, image_module)
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def decode_all(encoded: np.ndarray, offsets: np.ndarray, *, name: str) -> np.ndarray:
    """Images whose files lie one after the other in `encoded`: uint8 RGB, shape (samples, 3, height, width).

    Raises:
        DataError: offsets that do not fit the bytes, a file that cannot be decoded, or images of different sizes.
    """
    if encoded.dtype != np.uint8 or encoded.ndim != 1:
        raise DataError(f"{name}: jpeg is {encoded.dtype} of shape {encoded.shape}; expected one row of uint8 bytes")
    if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or len(offsets) < 2:
        raise DataError(
            f"{name}: offsets are {offsets.dtype} of shape {offsets.shape}; expected images + 1 integers, at least 2"
        )
    bounds = offsets.astype(np.int64)
    if bounds[0] < 0 or bounds[-1] > len(encoded) or (np.diff(bounds) <= 0).any():
        raise DataError(f"{name}: offsets must rise within 0..{len(encoded)}, the number of bytes in jpeg")
    images = []
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        image = decode(encoded[begin:end].tobytes(), channels=3, size=None, name=f"{name}: image {number}")
        if images and image.shape != images[0].shape:
            raise DataError(
                f"{name}: image {number} is {image.shape[2]} x {image.shape[1]}, image 0 is {images[0].shape[2]} x "
                f"{images[0].shape[1]}; resize them to one size"
            )
        images.append(image)
    return np.stack(images)


def pillow() -> Any:
    """Pillow's Image module.

    Raises:
        ImportError: Pillow is not installed; the message says how to install it.
    """
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "vision") from None
    return Image


def _fitted(image: Any, size: int, image_module: Any) -> Any:
    """The shorter side scaled to `size`, with antialiasing, and the middle of the longer side."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), image_module.Resampling.BILINEAR, box=(left, top, left + side, top + side))
