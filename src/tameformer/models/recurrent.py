"""Recurrent networks, for comparison: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014, arXiv:1406.1078).

The recurrences are torch's own; here is what stands before and after them, so that a recipe can take one in place of a
Transformer.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

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

    def forward(self, tokens: Tokens, *, positions: Tokens | None = None) -> Float[Tensor, "batch seq vocab"]:
        """Logits over the vocabulary after each token, from a state of zeros before the first.

        Args:
            tokens: token numbers below `vocab_size`.
            positions: position of each token; where it is 0 another document begins, which sees none before it. None is one
                document a row.
        """
        x = self.dropout(self.embedding(tokens))
        states = self.recurrence(x)[0] if positions is None else restarting(self.recurrence, x, positions == 0)
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


def restarting(layers: nn.LSTM | nn.GRU, x: Stream, begins: Real) -> Float[Tensor, "batch seq features"]:
    """What the layers give for each stretch on its own; one begins wherever `begins` is True, and with every row.

    Example:
        >>> layers, x = nn.GRU(2, 3, batch_first=True), torch.randn(1, 5, 2)
        >>> two = torch.cat([layers(x[:, :2])[0], layers(x[:, 2:])[0]], dim=1)
        >>> torch.allclose(restarting(layers, x, torch.tensor([[True, False, True, False, False]])), two, atol=1e-6)
        True
    """
    firsts = begins.clone()
    firsts[:, 0] = True
    starts = firsts.flatten().nonzero().squeeze(1)
    stretch = firsts.flatten().cumsum(0) - 1
    place = torch.arange(len(stretch), device=x.device) - starts[stretch]
    rank = stretch.bincount().argsort(descending=True, stable=True).argsort()
    # Packed as torch packs sequences: the first tokens of all, longest stretch first, then the second ones. It takes the
    # sizes on the host, so that an accelerator waits here.
    order = (place * len(starts) + rank[stretch]).argsort()
    packed = PackedSequence(x.flatten(0, 1)[order], place.bincount().cpu())
    return layers(packed)[0].data[order.argsort()].view(*x.shape[:2], -1)


def recurrence(config: RecurrentConfig, dim: int, *, bidirectional: bool = False) -> nn.LSTM | nn.GRU:
    """The layers that `config` describes, of `dim` features a direction; they read vectors of width `config.dim`."""
    between = config.dropout if config.num_layers > 1 else 0.0  # torch warns of dropout that no layer follows
    return CELLS[config.architecture](
        config.dim, dim, config.num_layers, batch_first=True, dropout=between, bidirectional=bidirectional
    )


def recurrent_decoder(config: RecurrentDecoderConfig, *, vocab_size: int) -> RecurrentDecoder:
    """A recurrent language model with fresh weights, the same for the same `torch.manual_seed`.

    Example:
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
