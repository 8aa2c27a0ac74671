"""An encoder with what predicts masked words on top, and the same encoder with what classifies texts.

Devlin et al. 2018, "BERT", arXiv:1810.04805. In both the encoder has the name `encoder`, so that its weights go from one to the
other by their names.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.models.encoder import Encoder, EncoderConfig, encoder
from tameformer.models.initialize import Initializer, gpt2_init
from tameformer.models.parts import PARTS
from tameformer.nn.layer_mix import LayerMix
from tameformer.nn.pooling import Pooling
from tameformer.shapes import Bool, Float, Real, Tokens


@dataclass(frozen=True, kw_only=True)
class TextClassifierConfig(EncoderConfig):
    """An encoder that classifies texts."""

    pooling: Literal["mean", "max", "attention"] = "mean"
    """How the outputs at all tokens become one classification."""
    head_dropout: float = 0.1
    """Probability of dropping a feature on its way into the head."""
    layer_mix: bool = False
    """Whether the head reads a learned mix of all layers, which starts as their mean, in place of the last one."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"expected 0 <= head_dropout < 1, got {self.head_dropout}; it is a probability")


class MaskedLanguageModel(nn.Module):
    """Logits of the tokens that were masked; built by `masked_language_model`."""

    def __init__(self, encoder: Encoder, dim: int, norm: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.transform = nn.Linear(dim, dim)
        self.norm = norm

    def forward(
        self, tokens: Tokens, *, at: Bool[Tensor, "batch seq"], real: Real | None = None
    ) -> Float[Tensor, "masked vocab"]:
        """Logits at the tokens where `at` is True, row by row; the others cost nothing."""
        x = self.encoder(tokens, real=real)[at]
        return self.encoder.embedding.logits(self.norm(F.gelu(self.transform(x)))[None])[0]


class TextClassifier(nn.Module):
    """Logits of the classes of a text; built by `text_classifier`."""

    def __init__(
        self, encoder: Encoder, pooling: Pooling, dropout: float, head: nn.Linear, mix: LayerMix | None = None
    ):
        super().__init__()
        self.encoder = encoder
        self.mix = mix
        self.pooling = pooling
        self.head_dropout = nn.Dropout(dropout)
        self.head = head

    def forward(self, tokens: Tokens, *, real: Real | None = None) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; `real` is True at real tokens, None says that none is padding."""
        mix, below = self.mix, self.encoder
        x = below(tokens, real=real) if mix is None else mix(below.hidden_states(tokens, real=real))
        return self.pooling(x, lambda x: self.head(self.head_dropout(x)), real)


def masked_language_model(
    config: EncoderConfig, *, vocab_size: int, initialize: Initializer = gpt2_init
) -> MaskedLanguageModel:
    """A masked language model with fresh weights, its output tied to its embedding.

    Example:
        >>> import torch
        >>> model = masked_language_model(EncoderConfig(dim=32, num_layers=2), vocab_size=65)
        >>> tokens = torch.zeros(2, 8, dtype=torch.long)
        >>> at = torch.zeros(2, 8, dtype=torch.bool)
        >>> at[0, 3] = at[1, 5] = at[1, 6] = True
        >>> model(tokens, at=at).shape
        torch.Size([3, 65])
    """
    below = encoder(config, vocab_size=vocab_size)
    model = MaskedLanguageModel(below, config.dim, PARTS["norm"][config.norm](config.dim, bias=config.bias))
    initialize(model)
    return model


def text_classifier(
    config: TextClassifierConfig, *, vocab_size: int, num_classes: int, initialize: Initializer = gpt2_init
) -> TextClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> import torch
        >>> model = text_classifier(TextClassifierConfig(dim=32, num_layers=2), vocab_size=65, num_classes=3)
        >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 3])
    """
    below, pooling = encoder(config, vocab_size=vocab_size), PARTS["pooling"][config.pooling](config.dim)
    mix = LayerMix(config.num_layers + 1) if config.layer_mix else None
    model = TextClassifier(below, pooling, config.head_dropout, nn.Linear(config.dim, num_classes), mix)
    initialize(model)
    return model
