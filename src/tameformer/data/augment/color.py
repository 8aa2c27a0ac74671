"""Changes of colour and tone, image by image, for values in [0, 1]; Pillow's operations on tensors.

Each takes `images` (batch, channels, height, width) and, where it has a strength, one number per image.
"""

import torch
from torch import Tensor

from tameformer.shapes import Float

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's "L"


def brightness(
    images: Float[Tensor, "batch channels height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Multiply; 0 gives black, 1 the image."""
    return (images * _per_image(factor)).clamp(0, 1)


def contrast(
    images: Float[Tensor, "batch channels height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Blend with the image's mean grey; 0 gives that grey, 1 the image."""
    mean = grey(images).double().mean((1, 2, 3), keepdim=True).float()  # in float64, so that no order of sums shows
    return _blend(mean, images, factor)


def saturation(
    images: Float[Tensor, "batch channels height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Blend with the grey image; 0 gives grey, 1 the image. Grey images stay as they are."""
    return images if images.shape[1] == 1 else _blend(grey(images), images, factor)


def sharpness(
    images: Float[Tensor, "batch channels height width"], factor: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Blend with the smoothed image (3 x 3, centre 5 of 13, border untouched); 0 gives that, 1 the image."""
    height, width = images.shape[-2:]
    if min(height, width) < 3:
        return images
    # Not a convolution: its algorithm, and so its rounding, changes with the size of the batch.
    columns = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    block = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = (block + 4 * images[..., 1:-1, 1:-1]) / 13
    return _blend(smooth, images, factor)


def posterize(
    images: Float[Tensor, "batch channels height width"], bits: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Keep the upper `bits` (1..8, whole) of 8-bit values; 8 leaves an image alone."""
    step = _per_image(2 ** (8 - bits))
    kept = (torch.round(images * 255) / step).floor() * step / 255
    return torch.where(step == 1, images, kept)


def solarize(
    images: Float[Tensor, "batch channels height width"], threshold: Float[Tensor, " batch"]
) -> Float[Tensor, "batch channels height width"]:
    """Invert values above the threshold; 1 leaves an image alone, 0 inverts it."""
    return torch.where(images > _per_image(threshold), 1 - images, images)


def autocontrast(
    images: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "batch channels height width"]:
    """Stretch every channel to [0, 1]; a constant channel stays as it is."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / torch.where(span > 0, span, 1), images)


def equalize(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
    """Spread the 256 grey levels of every channel evenly, as Pillow's ImageOps.equalize."""
    levels = (images * 255).round().clamp(0, 255).long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.int64).scatter_add_(2, levels, torch.ones_like(levels))
    above = torch.where(counts > 0, torch.arange(256), -1).amax(-1, keepdim=True)  # the brightest level that occurs
    step = (counts.sum(-1, keepdim=True) - counts.gather(2, above)) // 255
    before = counts.cumsum(-1) - counts
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    equal = table.gather(2, levels).to(images.dtype).view_as(images) / 255
    return torch.where((step > 0)[..., None], equal, images)


def grey(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Luma of the first three channels, or the only channel."""
    if images.shape[1] < 3:
        return images[:, :1]
    red, green, blue = images[:, 0:1], images[:, 1:2], images[:, 2:3]
    return _GREY[0] * red + _GREY[1] * green + _GREY[2] * blue


def _per_image(values: Tensor) -> Tensor:
    return values.float()[:, None, None, None]


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    return (other + _per_image(factor) * (images - other)).clamp(0, 1)
