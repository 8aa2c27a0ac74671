"""An encoder: a vector for every token of a text, each seeing all the others (Devlin et al. 2018, arXiv:1810.04805)."""

from dataclasses import dataclass

from torch import nn

from tameformer.models.initialize import Initializer, gpt2_init
from tameformer.models.stack import Stack, StackConfig, added_positions, embedding_scale, layer_stack
from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.masks import padding_mask
from tameformer.shapes import Real, Stream, Tokens


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(StackConfig):
    """An encoder of token sequences."""

    num_layers: int = 4
    """Layers."""
    max_length: int = 256
    """Longest sequence, in tokens."""


class Encoder(nn.Module):
    """Embedding, positions and a stack without causal mask; built by `encoder`."""

    def __init__(self, embedding: TokenEmbedding, positions: nn.Module | None, dropout: float, stack: Stack):
        super().__init__()
        self.embedding = embedding
        self.positions = positions
        self.dropout = nn.Dropout(dropout)
        self.stack = stack

    def forward(self, tokens: Tokens, *, real: Real | None = None, positions: Tokens | None = None) -> Stream:
        """The outputs at all tokens; `real` is True at real tokens, None says that none is padding."""
        mask = None if real is None else padding_mask(real)
        return self.stack(self._embedded(tokens, positions), mask=mask, positions=positions)

    def hidden_states(self, tokens: Tokens, *, real: Real | None = None) -> list[Stream]:
        """The embeddings and the output of each layer, all through the norm at the end; the last one is the output."""
        mask = None if real is None else padding_mask(real)
        return self.stack.outputs(self._embedded(tokens, None), mask=mask, positions=None)

    def _embedded(self, tokens: Tokens, positions: Tokens | None) -> Stream:
        x = self.embedding(tokens)
        return self.dropout(x if self.positions is None else self.positions(x, positions))


def encoder(config: EncoderConfig, *, vocab_size: int, initialize: Initializer = gpt2_init) -> Encoder:
    """An encoder with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> import torch
        >>> model = encoder(EncoderConfig(dim=32, num_layers=2), vocab_size=65)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 32])
    """
    model = Encoder(
        TokenEmbedding(vocab_size, config.dim, scale=embedding_scale(config)),
        added_positions(config, config.max_length),
        config.dropout,
        layer_stack(config, num_layers=config.num_layers, max_length=config.max_length),
    )
    initialize(model)
    return model
