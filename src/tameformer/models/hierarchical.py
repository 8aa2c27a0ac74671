"""Words become sentences, and sentences a document.

Yang et al. 2016, "Hierarchical Attention Networks for Document Classification", NAACL. Each level encodes its sequence and
pools it by attention from a learned query; the weights say which words and sentences the document was classified by. The
encoders are recurrent as in the paper, or Transformers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tameformer.models.initialize import Initializer, gpt2_init
from tameformer.models.recurrent import RecurrentConfig, RecurrentEncoder
from tameformer.models.stack import Stack, StackConfig, added_positions, embedding_scale, layer_stack
from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.masks import padding_mask
from tameformer.nn.query_pooling import QueryPooling
from tameformer.shapes import Bool, Float, Int, Real, Stream

Documents = Int[Tensor, "batch sentences words"]
RealWords = Bool[Tensor, "batch sentences words"]


@dataclass(frozen=True, kw_only=True)
class HierarchicalConfig(StackConfig):
    """A classifier of documents.

    Of what it inherits from a stack, recurrent encoders read dim and dropout only.
    """

    encoder: Literal["gru", "lstm", "transformer"] = "gru"
    """What encodes the words of a sentence, and the sentences of a document."""
    num_word_layers: int = 1
    """Layers over words."""
    num_sentence_layers: int = 1
    """Layers over sentences."""
    max_words: int = 64
    """Longest sentence, in tokens."""
    max_sentences: int = 32
    """Longest document, in sentences."""


class DocumentAttention(NamedTuple):
    """What a document was classified by."""

    words: Float[Tensor, "batch sentences words"]
    """Each word's share of its sentence."""
    sentences: Float[Tensor, "batch sentences"]
    """Each sentence's share of the document."""


class LevelEncoder(nn.Module):
    """Positions and Transformer layers over one level."""

    def __init__(self, positions: nn.Module | None, stack: Stack):
        super().__init__()
        self.positions = positions
        self.stack = stack

    def forward(self, x: Stream, real: Real | None = None) -> Stream:
        """A vector for each position."""
        x = x if self.positions is None else self.positions(x)
        return self.stack(x, mask=None if real is None else padding_mask(real))


class HierarchicalClassifier(nn.Module):
    """Logits of the classes of a document; built by `hierarchical_classifier`."""

    def __init__(
        self,
        *,
        embedding: TokenEmbedding,
        word_encoder: nn.Module,
        sentence_encoder: nn.Module,
        dropout: float,
        num_classes: int,
        padding_id: int,
    ):
        super().__init__()
        dim = embedding.weight.shape[1]
        self.embedding = embedding
        self.word_encoder, self.word_pooling = word_encoder, QueryPooling(dim)
        self.sentence_encoder, self.sentence_pooling = sentence_encoder, QueryPooling(dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, num_classes)
        self.padding_id = padding_id

    def forward(self, tokens: Documents, *, real: RealWords | None = None) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; `real` is True at real tokens, None takes all that are not `padding_id`.

        Padding stands at the end of sentences and of documents. Sentences without a real token are never computed.
        """
        real = tokens != self.padding_id if real is None else real
        sentences = self._sentences(tokens, real)[0]
        encoded = self.sentence_encoder(self.dropout(sentences), real.any(-1))
        return self.head(self.dropout(self.sentence_pooling(encoded, real.any(-1))))

    @torch.no_grad()
    def attention(self, tokens: Documents, *, real: RealWords | None = None) -> DocumentAttention:
        """Which words and sentences counted; zeros at padding."""
        real = tokens != self.padding_id if real is None else real
        sentences, encoded_words = self._sentences(tokens, real)
        there = real.any(-1)
        words = encoded_words.new_zeros(real.shape)
        words[there] = self.word_pooling.weights(encoded_words, real[there]).to(words.dtype)
        encoded = self.sentence_encoder(self.dropout(sentences), there)
        return DocumentAttention(words, self.sentence_pooling.weights(encoded, there))

    def _sentences(self, tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """A vector for each sentence, zeros where there is none, and the encoded words of those that are there."""
        there = real.any(-1)
        if not there.any(-1).all():
            raise ValueError("expected documents with at least one real token each, got one without; drop it")
        words = self.word_encoder(self.dropout(self.embedding(tokens[there])), real[there])
        pooled = self.word_pooling(words, real[there])
        sentences = pooled.new_zeros(*there.shape, pooled.shape[-1])
        return sentences.index_put((there,), pooled), words


def hierarchical_classifier(
    config: HierarchicalConfig,
    *,
    vocab_size: int,
    num_classes: int,
    padding_id: int,
    initialize: Initializer = gpt2_init,
) -> HierarchicalClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> model = hierarchical_classifier(HierarchicalConfig(dim=16), vocab_size=65, num_classes=2, padding_id=0)
        >>> model(torch.ones(3, 4, 5, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    def level(num_layers: int, max_length: int) -> nn.Module:
        if config.encoder == "transformer":
            stack = layer_stack(config, num_layers=num_layers, max_length=max_length)
            return LevelEncoder(added_positions(config, max_length), stack)
        return RecurrentEncoder(RecurrentConfig(architecture=config.encoder, dim=config.dim, num_layers=num_layers))

    scale = embedding_scale(config) if config.encoder == "transformer" else 1.0
    model = HierarchicalClassifier(
        embedding=TokenEmbedding(vocab_size, config.dim, scale=scale),
        word_encoder=level(config.num_word_layers, config.max_words),
        sentence_encoder=level(config.num_sentence_layers, config.max_sentences),
        dropout=config.dropout,
        num_classes=num_classes,
        padding_id=padding_id,
    )
    initialize(model)
    return model
