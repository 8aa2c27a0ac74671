"""A few strided convolutions in place of the patches.

Xiao et al. 2021, "Early Convolutions Help Transformers See Better", arXiv:2106.14881.

Differs from the paper: group normalization with one group instead of batch normalization, so that an example's tokens
do not depend on the other examples; any patch size, not only 16.
"""

from torch import nn

from tameformer.shapes import Images, Stream


def prime_factors(number: int) -> list[int]:
    """Prime factors, smallest first; [1] for 1.

    Example:
        >>> prime_factors(12)
        [2, 2, 3]
    """
    factors, candidate = [], 2
    while number > 1:
        while number % candidate == 0:
            factors.append(candidate)
            number //= candidate
        candidate += 1
    return factors or [1]


class ConvolutionStem(nn.Module):
    """One convolution a prime factor of `patch_size`, with that stride, width doubling up to `dim`, then a 1x1 one.

    Gives as many tokens as the patch stem of that size.
    """

    def __init__(self, channels: int, patch_size: int, dim: int):
        super().__init__()
        strides = prime_factors(patch_size)
        widths = [max(1, dim // 2 ** (len(strides) - stage - 1)) for stage in range(len(strides))]
        stages = []
        for inputs, outputs, stride in zip([channels, *widths], widths, strides, strict=False):
            kernel = max(3, stride)
            stages.append(nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - stride + 1) // 2, bias=False))
            stages += [nn.GroupNorm(1, outputs), nn.ReLU()]
        self.stages = nn.Sequential(*stages)
        self.project = nn.Conv2d(widths[-1], dim, kernel_size=1)

    def forward(self, images: Images) -> Stream:
        """The tokens, row by row."""
        return self.project(self.stages(images)).flatten(2).transpose(1, 2)
