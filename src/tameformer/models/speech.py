"""Speech recognition: convolutions, an encoder, and one of two heads over characters.

- "ctc": every output is a character or a blank (Graves et al. 2006, "Connectionist temporal classification");
- "decoder": a decoder that attends to the encoder writes the text (Chan et al. 2015, arXiv:1508.01211; Dong et al. 2018,
  "Speech-Transformer").

The encoder may be recurrent instead, with the head "ctc".
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tameformer.models.generate import Steps
from tameformer.models.initialize import Initializer, xavier_init
from tameformer.models.recurrent import RecurrentConfig, RecurrentEncoder
from tameformer.models.stack import Stack, StackConfig, added_positions, layer_stack
from tameformer.nn.attention import StackCache
from tameformer.nn.embedding import OutputHead, TokenEmbedding
from tameformer.nn.masks import padding_mask
from tameformer.nn.stems.frames import STRIDES, FrameStem
from tameformer.shapes import Bool, Float, Int, Real, Stream, Tokens

Features = Float[Tensor, "batch seq mels"]
Frames = Int[Tensor, " batch"]
"""Real rows of features of each utterance."""
Outputs = Bool[Tensor, "batch outputs"]
"""True at real outputs of the encoder."""


@dataclass(frozen=True, kw_only=True)
class SpeechConfig(StackConfig):
    """A speech recognizer of Transformer layers."""

    head: Literal["ctc", "decoder"] = "ctc"
    """What writes the text: every output of the encoder, or a decoder."""
    num_layers: int = 4
    """Layers of the encoder."""
    num_decoder_layers: int = 2
    """Layers of the decoder, where there is one."""
    subsampling: int = 2
    """Rows of features that become one token: 1, 2 or 4."""
    max_length: int = 1024
    """Longest utterance after subsampling, and longest text, in tokens."""

    def __post_init__(self):
        super().__post_init__()
        _check_subsampling(self.subsampling)


@dataclass(frozen=True, kw_only=True)
class RecurrentSpeechConfig(RecurrentConfig):
    """A speech recognizer of recurrent layers, half of the width in each direction."""

    head: Literal["ctc"] = "ctc"
    """What writes the text: every output of the encoder."""
    subsampling: int = 2
    """Rows of features that become one token: 1, 2 or 4."""

    def __post_init__(self):
        super().__post_init__()
        _check_subsampling(self.subsampling)


class TransformerEncoder(nn.Module):
    """Positions and a stack, over vectors."""

    def __init__(self, config: SpeechConfig):
        super().__init__()
        self.positions = added_positions(config, config.max_length)
        self.dropout = nn.Dropout(config.dropout)
        self.stack = layer_stack(config, num_layers=config.num_layers, max_length=config.max_length)

    def forward(self, x: Stream, real: Real) -> Stream:
        """The outputs at all positions."""
        if self.positions is not None:
            x = self.positions(x)
        return self.stack(self.dropout(x), mask=padding_mask(real))


class CTCRecognizer(nn.Module):
    """Logits of the characters, and of the blank at last, at every output; built by `speech_recognizer`."""

    def __init__(self, stem: FrameStem, encoder: nn.Module, dim: int, vocab_size: int):
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.head = nn.Linear(dim, vocab_size + 1)

    @property
    def blank(self) -> int:
        """The id of the blank: the number of characters."""
        return self.head.out_features - 1

    def forward(self, features: Features, frames: Frames) -> tuple[Float[Tensor, "batch outputs vocab"], Frames]:
        """The logits, and the real outputs of each utterance."""
        x, real = self.stem(features, frames)
        return self.head(self.encoder(x, real)), real.sum(1)


class DecoderRecognizer(nn.Module):
    """Logits of the next character after each; built by `speech_recognizer`. The last two ids begin and end a text."""

    def __init__(self, stem: FrameStem, encoder: nn.Module, config: SpeechConfig, vocab_size: int):
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        self.embedding = TokenEmbedding(vocab_size + 2, config.dim, scale=config.dim**0.5)
        self.positions = added_positions(config, config.max_length)
        self.dropout = nn.Dropout(config.dropout)
        self.decoder: Stack = layer_stack(
            config, num_layers=config.num_decoder_layers, max_length=config.max_length, cross_attention=True
        )
        self.head = OutputHead(config.dim, vocab_size + 2)
        self.max_length = config.max_length
        self.begin_id, self.end_id = vocab_size, vocab_size + 1

    def encode(self, features: Features, frames: Frames) -> tuple[Float[Tensor, "batch outputs dim"], Outputs]:
        """The encoder's outputs, and True at the real ones."""
        x, real = self.stem(features, frames)
        return self.encoder(x, real), real

    def decode(
        self,
        target_in: Int[Tensor, "batch target"],
        memory: Float[Tensor, "batch outputs dim"],
        real: Outputs,
        cache: StackCache | None = None,
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits after each token; with `cache`, `target_in` holds those that it has not seen."""
        x = self.embedding(target_in)
        if self.positions is not None:
            x = self.positions(x, start=0 if cache is None else cache.length)
        x = self.decoder(self.dropout(x), memory=memory, memory_mask=padding_mask(real), is_causal=True, cache=cache)
        return self.head(x)

    def forward(
        self, features: Features, frames: Frames, target_in: Int[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target vocab"]:
        """Logits after each token of `target_in`, which starts with the begin token."""
        memory, real = self.encode(features, frames)
        return self.decode(target_in, memory, real)


class _TranscriptionSteps:
    def __init__(self, model: DecoderRecognizer, features: Features, frames: Frames):
        self.prompt: Tokens = frames.new_full((len(frames), 1), model.begin_id)
        self.max_new_tokens = model.max_length
        self._model, self._cache = model, StackCache(len(model.decoder.layers))
        self._memory, self._real = model.encode(features, frames)

    def advance(self, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
        return self._model.decode(tokens, self._memory, self._real, self._cache)[:, -1]

    def select(self, rows: Int[Tensor, " rows"], *, same_source: bool) -> None:
        self._cache.select(rows, same_memory=same_source)
        if not same_source:
            self._memory, self._real = self._memory[rows], self._real[rows]


@torch.no_grad()
def transcription_steps(model: DecoderRecognizer, features: Features, frames: Frames) -> Steps:
    """Steps that write the texts of utterances, for `greedy` and `beam_search`.

    Raises:
        ValueError: The model is in training mode.
    """
    if model.training:
        raise ValueError("expected a model in evaluation mode, got training=True; call model.eval() first")
    return _TranscriptionSteps(model, features, frames)


def speech_recognizer(
    config: SpeechConfig, *, num_features: int, vocab_size: int, initialize: Initializer = xavier_init
) -> CTCRecognizer | DecoderRecognizer:
    """A recognizer with fresh weights, the same for the same `torch.manual_seed`; `vocab_size` counts characters.

    Example:
        >>> model = speech_recognizer(SpeechConfig(dim=32), num_features=40, vocab_size=16)
        >>> logits, outputs = model(torch.zeros(1, 21, 40), torch.tensor([21]))
        >>> logits.shape, outputs
        (torch.Size([1, 11, 17]), tensor([11]))
    """
    stem, encoder = FrameStem(num_features, config.dim, config.subsampling), TransformerEncoder(config)
    if config.head == "ctc":
        model = CTCRecognizer(stem, encoder, config.dim, vocab_size)
    else:
        model = DecoderRecognizer(stem, encoder, config, vocab_size)
    initialize(model)
    return model


def recurrent_recognizer(config: RecurrentSpeechConfig, *, num_features: int, vocab_size: int) -> CTCRecognizer:
    """A recognizer with recurrent layers; arguments as for `speech_recognizer`.

    Example:
        >>> model = recurrent_recognizer(RecurrentSpeechConfig(dim=32), num_features=40, vocab_size=16)
        >>> model(torch.zeros(1, 21, 40), torch.tensor([21]))[0].shape
        torch.Size([1, 11, 17])
    """
    stem = FrameStem(num_features, config.dim, config.subsampling)
    return CTCRecognizer(stem, RecurrentEncoder(config), config.dim, vocab_size)


def _check_subsampling(subsampling: int) -> None:
    if subsampling not in STRIDES:
        raise ValueError(f"expected subsampling to be one of {', '.join(map(str, STRIDES))}, got {subsampling}")
