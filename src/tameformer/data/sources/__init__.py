"""Data sets: `fetch(keys)` gives the samples of these keys, always the same ones."""

from tameformer.data.sources.arrays import ArraySource, array_source
from tameformer.data.sources.decoded import DecodedImages
from tameformer.data.sources.digits import digits
from tameformer.data.sources.hub import hub_images
from tameformer.data.sources.image_folder import image_folder
from tameformer.data.sources.images import Transform
from tameformer.data.sources.npz import npz_arrays

__all__ = [
    "ArraySource",
    "DecodedImages",
    "Transform",
    "array_source",
    "digits",
    "hub_images",
    "image_folder",
    "npz_arrays",
]
