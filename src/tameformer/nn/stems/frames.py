"""Two convolutions over time in front of speech layers (as in Radford et al. 2022, "Whisper", arXiv:2212.04356).

Differs from the paper: what stands at padding is put to zero between the two, so that the outputs of an utterance do not
depend on what it is batched with; any subsampling that is a product of two strides.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.nn.masks import real_from_lengths
from tameformer.shapes import Bool, Float, Int, Stream

STRIDES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}
"""Strides of the two convolutions by the subsampling."""


class FrameStem(nn.Module):
    """GELU(convolution) twice, kernel 3, over rows of features."""

    def __init__(self, num_features: int, dim: int, subsampling: int = 2):
        super().__init__()
        if subsampling not in STRIDES:
            raise ValueError(f"expected subsampling to be one of {', '.join(map(str, STRIDES))}, got {subsampling}")
        first, second = STRIDES[subsampling]
        self.first = nn.Conv1d(num_features, dim, 3, first, padding=1)
        self.second = nn.Conv1d(dim, dim, 3, second, padding=1)

    def forward(
        self, features: Stream, frames: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch outputs width"], Bool[Tensor, "batch outputs"]]:
        """The tokens, and True at those of real rows; `features` are zero behind the first `frames` rows of each."""
        x = features.transpose(1, 2)
        for convolution in (self.first, self.second):
            x = F.gelu(convolution(x))
            frames = -(-frames // convolution.stride[0])
            real = real_from_lengths(frames, x.shape[2])
            x = x * real[:, None]
        return x.transpose(1, 2), real
