"""A recurrent encoder-decoder that looks back at the source by additive attention, or does not.

Bahdanau et al. 2014, "Neural Machine Translation by Jointly Learning to Align and Translate", arXiv:1409.0473; without
attention, Cho et al. 2014, arXiv:1406.1078: one vector stands for the whole source.

Differs from the papers: source, target and output share one embedding; the output is one linear layer with tanh between
instead of maxout; beams keep the state as it is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tameformer.models.encoder_decoder import Memory, Source, SourceMask, Target
from tameformer.models.recurrent import RecurrentConfig, RecurrentEncoder
from tameformer.models.stack import check_choices, check_probabilities
from tameformer.nn.attention.attend import ScoreAttention
from tameformer.nn.attention.scores import AdditiveScore
from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.masks import real_from_tokens
from tameformer.shapes import Float, Tokens

State = Float[Tensor, "batch dim"]


@dataclass(frozen=True, kw_only=True)
class RecurrentTranslationConfig:
    """A recurrent encoder-decoder over one vocabulary."""

    architecture: Literal["gru"] = "gru"
    """Which architecture this is."""
    attention: Literal["additive", "none"] = "additive"
    """How the decoder sees the source: by a mixture of all its positions at every step, or by one vector for all of it."""
    dim: int = 256
    """Width of embeddings and states, in features; half for each direction of the encoder."""
    num_layers: int = 1
    """Layers of the encoder; the decoder has one."""
    dropout: float = 0.2
    """Probability of dropping a unit of embeddings and outputs."""
    max_length: int = 256
    """Longest source and longest target, in tokens."""

    def __post_init__(self):
        check_choices(self)
        check_probabilities(self, "dropout")


class RecurrentTranslation(nn.Module):
    """Logits of the next target token at every target position; built by `recurrent_translation`."""

    def __init__(self, config: RecurrentTranslationConfig, *, vocab_size: int, padding_id: int):
        super().__init__()
        dim = config.dim
        self.embedding = TokenEmbedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=dim**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = RecurrentEncoder(
            RecurrentConfig(architecture="gru", dim=dim, num_layers=config.num_layers, dropout=config.dropout)
        )
        self.attention = ScoreAttention(AdditiveScore(1, dim)) if config.attention == "additive" else None
        self.first = nn.Linear(dim, dim)
        self.cell = nn.GRUCell(2 * dim, dim)
        self.output = nn.Linear(3 * dim, dim)
        self.padding_id, self.max_length = padding_id, config.max_length

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without padding rows."""
        return self.embedding.vocab_size

    def encode(self, source: Source, *, source_mask: SourceMask) -> Memory:
        """The encoder's outputs, zeros at padding."""
        return self.encoder(self.dropout(self.embedding(source)), source_mask)

    def start(self, memory: Memory) -> State:
        """The decoder's first state, from what the encoder says at the source's first token, which it read last."""
        return torch.tanh(self.first(memory[:, 0]))

    def context(self, state: State, memory: Memory, source_mask: SourceMask) -> State:
        """What the decoder sees of the source in this state."""
        if self.attention is None:  # the two ends of the encoder's two directions
            last = source_mask.sum(1) - 1
            half = memory.shape[2] // 2
            ends = memory[torch.arange(len(memory), device=memory.device), last]
            return torch.cat([ends[:, :half], memory[:, 0, half:]], dim=1)
        query, key = state[:, None, None], memory[:, None]  # one head
        return self.attention(query, key, key, mask=source_mask[:, None, None])[:, 0, 0]

    def alignment(self, state: State, memory: Memory, source_mask: SourceMask) -> Float[Tensor, "batch source"]:
        """What the mixture of `context` is made of."""
        if self.attention is None:
            raise ValueError("this model has no attention; build it with attention additive")
        query, key = state[:, None, None], memory[:, None]
        return self.attention.weights(query, key, mask=source_mask[:, None, None])[:, 0, 0]

    def step(
        self, tokens: Float[Tensor, "batch dim"], state: State, memory: Memory, source_mask: SourceMask
    ) -> tuple[State, Float[Tensor, "batch wide"]]:
        """From an embedded token and the state before it to the state after it, and what the output is made of."""
        context = self.context(state, memory, source_mask)
        state = self.cell(torch.cat([tokens, context], dim=1), state).to(state.dtype)
        return state, torch.cat([state, context, tokens], dim=1)

    def logits(self, found: Float[Tensor, "batch seq wide"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token."""
        return self.embedding.logits(self.dropout(torch.tanh(self.output(found))))

    def forward(
        self, source: Source, target_in: Target, *, source_mask: SourceMask | None = None
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits after each token of `target_in`; `source_mask` is True at real tokens, None takes all but the padding."""
        source_mask = real_from_tokens(source, self.padding_id) if source_mask is None else source_mask
        memory = self.encode(source, source_mask=source_mask)
        state, tokens, found = self.start(memory), self.dropout(self.embedding(target_in)), []
        for place in range(target_in.shape[1]):
            state, outputs = self.step(tokens[:, place], state, memory, source_mask)
            found.append(outputs)
        return self.logits(torch.stack(found, dim=1))


class RecurrentSteps:
    """A recurrent translation in the middle of decoding, for `greedy`, `sample` and `beam_search`."""

    def __init__(self, model: RecurrentTranslation, source: Source, source_mask: SourceMask, start_id: int):
        self.prompt: Tokens = source.new_full((source.shape[0], 1), start_id)
        self.max_new_tokens = model.max_length
        self._model, self._source_mask = model, source_mask
        self._memory = model.encode(source, source_mask=source_mask)
        self._state = model.start(self._memory)

    def advance(self, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        """Reads the tokens that follow; returns the logits after the last of them."""
        found = None
        for place in range(tokens.shape[1]):
            embedded = self._model.embedding(tokens[:, place : place + 1])[:, 0]
            self._state, found = self._model.step(embedded, self._state, self._memory, self._source_mask)
        assert found is not None, "at least one token is read"
        return self._model.logits(found[:, None])[:, 0]

    def select(self, rows: Tensor, *, same_source: bool) -> None:
        """Goes on with the given rows."""
        self._state = self._state[rows]
        self._memory, self._source_mask = self._memory[rows], self._source_mask[rows]


def recurrent_translation(
    config: RecurrentTranslationConfig, *, vocab_size: int, padding_id: int
) -> RecurrentTranslation:
    """A recurrent encoder-decoder with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> model = recurrent_translation(RecurrentTranslationConfig(dim=16), vocab_size=65, padding_id=0)
        >>> model(torch.ones(2, 5, dtype=torch.long), torch.ones(2, 4, dtype=torch.long)).shape
        torch.Size([2, 4, 65])
    """
    return RecurrentTranslation(config, vocab_size=vocab_size, padding_id=padding_id)
