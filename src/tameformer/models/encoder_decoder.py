"""An encoder-decoder for pairs of sequences over one vocabulary (Vaswani et al. 2017, arXiv:1706.03762).

Source embedding, target embedding and output share one weight (Press and Wolf 2017, arXiv:1608.05859, "three-way").
"""

from dataclasses import dataclass

from torch import Tensor, nn

from tameformer.models.initialize import Initializer, xavier_init
from tameformer.models.stack import Stack, StackConfig, added_positions, layer_stack
from tameformer.nn.attention import StackCache
from tameformer.nn.embedding import OutputHead, TokenEmbedding
from tameformer.nn.masks import padding_mask, real_from_tokens
from tameformer.shapes import Bool, Float, Int

Source = Int[Tensor, "batch source"]
SourceMask = Bool[Tensor, "batch source"]
Memory = Float[Tensor, "batch source dim"]
Target = Int[Tensor, "batch target"]


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(StackConfig):
    """An encoder-decoder over one vocabulary."""

    num_encoder_layers: int = 4
    """Layers of the encoder."""
    num_decoder_layers: int = 4
    """Layers of the decoder."""
    max_length: int = 256
    """Longest source and longest target, in tokens."""
    tie_embeddings: bool = True
    """Whether source embedding, target embedding and output share one weight; otherwise each has its own."""


class EncoderDecoder(nn.Module):
    """Logits of the next target token at every target position; built by `encoder_decoder`."""

    def __init__(
        self,
        *,
        embedding: TokenEmbedding,
        target_embedding: TokenEmbedding | None,
        source_positions: nn.Module | None,
        target_positions: nn.Module | None,
        dropout: float,
        encoder: Stack,
        decoder: Stack,
        head: OutputHead | None,
        padding_id: int,
        max_length: int,
    ):
        super().__init__()
        self.embedding = embedding
        self.target_embedding = target_embedding
        self.source_positions = source_positions
        self.target_positions = target_positions
        self.dropout = nn.Dropout(dropout)
        self.encoder = encoder
        self.decoder = decoder
        self.head = head
        self.padding_id = padding_id
        self.max_length = max_length

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without padding rows."""
        return self.embedding.vocab_size

    def new_cache(self) -> StackCache:
        """An empty cache to decode with."""
        return self.decoder.new_cache()

    def encode(self, source: Source, *, source_mask: SourceMask | None = None) -> Memory:
        """The encoder's outputs; `source_mask` is True at real tokens, None takes all that are not `padding_id`."""
        x = self.embedding(source)
        if self.source_positions is not None:
            x = self.source_positions(x)
        return self.encoder(self.dropout(x), mask=padding_mask(self._real(source, source_mask)))

    def decode(
        self, target_in: Target, memory: Memory, *, source_mask: SourceMask, cache: StackCache | None = None
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits after each token of `target_in`, which starts with the start token.

        Padding at the end of `target_in` needs no mask: each position sees itself and earlier ones only.
        With `cache`, `target_in` holds the tokens that the cache has not seen, and `memory` is read the first time.
        """
        x = (self.embedding if self.target_embedding is None else self.target_embedding)(target_in)
        if self.target_positions is not None:
            x = self.target_positions(x, start=0 if cache is None else cache.length)
        x = self.decoder(
            self.dropout(x), memory=memory, memory_mask=padding_mask(source_mask), is_causal=True, cache=cache
        )
        return self.embedding.logits(x) if self.head is None else self.head(x)

    def forward(
        self, source: Source, target_in: Target, *, source_mask: SourceMask | None = None
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits after each token of `target_in`; `source_mask` as in `encode`."""
        source_mask = self._real(source, source_mask)
        return self.decode(target_in, self.encode(source, source_mask=source_mask), source_mask=source_mask)

    def _real(self, source: Source, source_mask: SourceMask | None) -> SourceMask:
        return real_from_tokens(source, self.padding_id) if source_mask is None else source_mask


def encoder_decoder(
    config: EncoderDecoderConfig, *, vocab_size: int, padding_id: int, initialize: Initializer = xavier_init
) -> EncoderDecoder:
    """An encoder-decoder with fresh weights, the same for the same `torch.manual_seed`.

    Embeddings are multiplied by sqrt(dim), as `xavier_init` expects.

    Raises:
        ValueError: `padding_id` is not a token.

    Example:
        >>> import torch
        >>> config = EncoderDecoderConfig(dim=32, num_encoder_layers=2, num_decoder_layers=2, positions="sinusoidal")
        >>> model = encoder_decoder(config, vocab_size=100, padding_id=0)
        >>> model(torch.ones(3, 7, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)).shape
        torch.Size([3, 5, 100])
    """
    if not 0 <= padding_id < vocab_size:
        raise ValueError(f"expected 0 <= padding_id < vocab_size = {vocab_size}, got {padding_id}; ask the tokenizer")

    def embedding() -> TokenEmbedding:
        return TokenEmbedding(vocab_size, config.dim, scale=config.dim**0.5)

    length = config.max_length
    model = EncoderDecoder(
        embedding=embedding(),
        target_embedding=None if config.tie_embeddings else embedding(),
        source_positions=added_positions(config, length),
        target_positions=added_positions(config, length),
        dropout=config.dropout,
        encoder=layer_stack(config, num_layers=config.num_encoder_layers, max_length=length),
        decoder=layer_stack(config, num_layers=config.num_decoder_layers, max_length=length, cross_attention=True),
        head=None if config.tie_embeddings else OutputHead(config.dim, vocab_size),
        padding_id=padding_id,
        max_length=length,
    )
    initialize(model)
    return model
