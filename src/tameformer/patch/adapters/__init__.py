"""Where the residual branches sit: their norms, what reads the stream, and what is added to it."""

from tameformer.patch.adapters.branch import QK_NORMS, Attention, Branch, Matrix, NormPlace, Tap
from tameformer.patch.adapters.find import branches, num_branches, num_layers, stacks

__all__ = [
    "QK_NORMS",
    "Attention",
    "Branch",
    "Matrix",
    "NormPlace",
    "Tap",
    "branches",
    "num_branches",
    "num_layers",
    "stacks",
]
