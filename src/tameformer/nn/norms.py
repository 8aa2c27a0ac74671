"""Normalization layers, torch's own, behind one signature `norm(dim, *, bias)`.

LayerNorm: Ba et al. 2016, arXiv:1607.06450. RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467.
"""

from torch import nn


def layer_norm(dim: int, *, bias: bool = True) -> nn.LayerNorm:
    """Mean 0 and variance 1 over `dim`, then a learned weight and, where asked, bias."""
    return nn.LayerNorm(dim, eps=1e-5, bias=bias)


def rms_norm(dim: int, *, bias: bool = True) -> nn.RMSNorm:
    """Mean square 1 over `dim`, then a learned weight; it has no bias, whatever `bias` says.

    Torch's default epsilon is the machine epsilon, which is 0.008 in bf16; this is the 1e-6 of the Llama models.
    """
    return nn.RMSNorm(dim, eps=1e-6)
