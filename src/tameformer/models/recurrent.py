"""Recurrent networks, for comparison: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014, arXiv:1406.1078).

The recurrences are torch's own; here is what stands before and after them, so that a recipe can take one in place of a
Transformer.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tameformer.models.stack import check_choices, check_probabilities
from tameformer.nn.embedding import OutputHead, TokenEmbedding
from tameformer.shapes import Float, Real, Stream, Tokens

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig:
    """Recurrent layers, whatever stands before and after them."""

    architecture: Literal["lstm", "gru"] = "lstm"
    """Which architecture this is."""
    dim: int = 128
    """Width of a layer's output, in features."""
    num_layers: int = 2
    """Layers."""
    dropout: float = 0.0
    """Probability of dropping a unit of the inputs and of what goes from layer to layer."""

    def __post_init__(self):
        check_choices(self)
        check_probabilities(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class RecurrentDecoderConfig(RecurrentConfig):
    """A recurrent language model."""

    max_length: int = 256
    """Context that training sequences are cut to, in tokens; the state itself knows no limit."""


class RecurrentDecoder(nn.Module):
    """Logits of the next token at every position; built by `recurrent_decoder`."""

    def __init__(self, embedding: TokenEmbedding, dropout: float, recurrence: nn.LSTM | nn.GRU, head: OutputHead):
        super().__init__()
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.recurrence = recurrence
        self.head = head

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without padding rows."""
        return self.embedding.vocab_size

    def forward(self, tokens: Tokens) -> Float[Tensor, "batch seq vocab"]:
        """Logits over the vocabulary after each token, from a state of zeros before the first."""
        states, _ = self.recurrence(self.dropout(self.embedding(tokens)))
        return self.head(self.dropout(states))


class RecurrentEncoder(nn.Module):
    """A vector for every position that has seen all of them, half from the left and half from the right.

    Padding is never read, so that a sequence's outputs do not depend on what it is batched with.
    """

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        if config.dim % 2:
            raise ValueError(f"expected an even dim, half for each direction, got {config.dim}; make it even")
        self.dropout = nn.Dropout(config.dropout)
        self.recurrence = recurrence(config, config.dim // 2, bidirectional=True)

    def forward(self, x: Stream, real: Real | None = None) -> Stream:
        """The outputs; zeros at padding. `real` is True at real positions, which come first; None says that all are."""
        x = self.dropout(x)
        if real is None:
            return self.recurrence(x)[0]
        packed = pack_padded_sequence(x, real.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.recurrence(packed)[0], batch_first=True, total_length=x.shape[1])[0]


def recurrence(config: RecurrentConfig, dim: int, *, bidirectional: bool = False) -> nn.LSTM | nn.GRU:
    """The layers that `config` describes, of `dim` features a direction; they read vectors of width `config.dim`."""
    between = config.dropout if config.num_layers > 1 else 0.0  # torch warns of dropout that no layer follows
    return CELLS[config.architecture](
        config.dim, dim, config.num_layers, batch_first=True, dropout=between, bidirectional=bidirectional
    )


def recurrent_decoder(config: RecurrentDecoderConfig, *, vocab_size: int) -> RecurrentDecoder:
    """A recurrent language model with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> import torch
        >>> model = recurrent_decoder(RecurrentDecoderConfig(architecture="gru", dim=32), vocab_size=65)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 65])
    """
    return RecurrentDecoder(
        TokenEmbedding(vocab_size, config.dim),
        config.dropout,
        recurrence(config, config.dim),
        OutputHead(config.dim, vocab_size),
    )
