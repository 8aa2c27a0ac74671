"""Stems: what turns an image into tokens."""

from tameformer.nn.stems.convolution import ConvolutionStem
from tameformer.nn.stems.patch import PatchStem, grid_size

__all__ = ["ConvolutionStem", "PatchStem", "grid_size"]
