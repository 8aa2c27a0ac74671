"""Data sets: `fetch(keys)` gives the samples of these keys, always the same ones."""

from tameformer.data.sources.arrays import ArraySource, array_source
from tameformer.data.sources.digits import digits

__all__ = ["ArraySource", "array_source", "digits"]
