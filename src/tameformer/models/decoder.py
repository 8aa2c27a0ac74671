"""A decoder-only language model (Radford et al. 2019, "GPT-2").

With rotary positions, RMSNorm, SwiGLU, grouped key-value heads and no biases it is the Llama of Touvron et al. 2023,
arXiv:2302.13971.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from tameformer.models.initialize import Initializer, gpt2_init
from tameformer.models.stack import Stack, StackConfig, added_positions, embedding_scale, layer_stack
from tameformer.nn.attention import StackCache
from tameformer.nn.embedding import OutputHead, TokenEmbedding
from tameformer.shapes import Float, Mask, Tokens


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(StackConfig):
    """A decoder-only language model."""

    num_layers: int = 4
    """Layers."""
    max_length: int = 256
    """Context, in tokens: the longest sequence."""
    tie_embeddings: bool = True
    """Whether the logits use the weight of the token embedding."""


class Decoder(nn.Module):
    """Logits of the next token at every position; built by `decoder`."""

    def __init__(
        self,
        embedding: TokenEmbedding,
        positions: nn.Module | None,
        dropout: float,
        stack: Stack,
        head: OutputHead | None,
        max_length: int,
    ):
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.head = head
        self.max_length = max_length

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without padding rows."""
        return self.embedding.vocab_size

    def new_cache(self) -> StackCache:
        """An empty cache to generate with."""
        return self.stack.new_cache()

    def forward(
        self,
        tokens: Tokens,
        *,
        mask: Mask | None = None,
        positions: Tokens | None = None,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits over the vocabulary.

        Args:
            tokens: token numbers below `vocab_size`.
            mask: True where a position may attend; says everything, the causal part included (`document_mask`,
                or `causal_mask(...) & padding_mask(...)`); None is causal.
            positions: position of each token (packed documents count from 0 each); None counts from the first, or on
                from the cache.
            cache: what earlier calls have seen of the same sequences; extended in place.
        """
        start = 0 if cache is None else cache.length
        x = self.embedding(tokens)
        if self.positions is not None:
            x = self.positions(x, positions, start=start)
        x = self.stack(self.dropout(x), mask=mask, is_causal=mask is None, positions=positions, cache=cache)
        return self.embedding.logits(x) if self.head is None else self.head(x)


def decoder(config: DecoderConfig, *, vocab_size: int, initialize: Initializer = gpt2_init) -> Decoder:
    """A decoder with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> import torch
        >>> model = decoder(DecoderConfig(dim=32, num_layers=2), vocab_size=65)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 65])
    """
    model = Decoder(
        TokenEmbedding(vocab_size, config.dim, scale=embedding_scale(config)),
        added_positions(config, config.max_length),
        config.dropout,
        layer_stack(config, num_layers=config.num_layers, max_length=config.max_length),
        None if config.tie_embeddings else OutputHead(config.dim, vocab_size),
        config.max_length,
    )
    initialize(model)
    return model
