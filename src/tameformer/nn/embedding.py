"""Token embeddings and the logits over a vocabulary, with the table padded to a multiple of 64 rows.

Matrix products with a width that is a multiple of 64 run on the fast kernels of accelerators; 50,257 wide, they do not.
The padded rows exist in the weights only: logits always have `vocab_size` columns, cut, not masked with -inf,
because label smoothing would turn -inf into an infinite loss. So a padded token has no probability and is never
generated. On a CPU the weight is cut before the product, since the width does not matter there; elsewhere the
logits are cut after it.

Tied weights are one Parameter under one name: the output side is a function of the embedding's weight and holds
nothing, so a state_dict has no tensor twice and can be written as safetensors as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.shapes import Float, Stream, Tokens


def padded_size(vocab_size: int, multiple: int = 64) -> int:
    """`vocab_size` rounded up to a multiple.

    Example:
        >>> padded_size(65)
        128
    """
    return -(-vocab_size // multiple) * multiple


def vocabulary_logits(
    x: Stream, weight: Float[Tensor, "padded dim"], vocab_size: int
) -> Float[Tensor, "batch seq {vocab_size}"]:
    """X weightᵀ for the first `vocab_size` rows."""
    if x.device.type == "cpu":
        return F.linear(x, weight[:vocab_size])
    return F.linear(x, weight)[..., :vocab_size]


class TokenEmbedding(nn.Module):
    """One learned vector a token, times `scale`; also the logits that its own weight gives.

    Args:
        vocab_size: number of tokens.
        dim: width of a vector.
        scale: factor on the vectors, not on the logits (Vaswani et al. 2017 use sqrt(dim)).
    """

    def __init__(self, vocab_size: int, dim: int, *, scale: float = 1.0):
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"expected a vocab_size of at least 1, got {vocab_size}; count the tokens")
        self.vocab_size, self.scale = vocab_size, scale
        self.weight = nn.Parameter(torch.empty(padded_size(vocab_size), dim))
        nn.init.normal_(self.weight)

    def forward(self, tokens: Tokens) -> Stream:
        """The vectors of `tokens`, which must be below `vocab_size`."""
        x = F.embedding(tokens, self.weight)
        return x if self.scale == 1.0 else x * self.scale

    def logits(self, x: Stream) -> Float[Tensor, "batch seq vocab"]:
        """Logits of a tied output: the products with each token's unscaled vector."""
        return vocabulary_logits(x, self.weight, self.vocab_size)

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        return f"{self.vocab_size}, {self.weight.shape[1]}, rows={self.weight.shape[0]}"


class OutputHead(nn.Module):
    """Logits over the vocabulary with a weight of its own, without bias."""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(padded_size(vocab_size), dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, x: Stream) -> Float[Tensor, "batch seq vocab"]:
        """The logits, `vocab_size` wide."""
        return vocabulary_logits(x, self.weight, self.vocab_size)
