"""A recurrent classifier of texts, for comparison: both directions read the text, and the states are pooled."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tameformer.models.parts import PARTS
from tameformer.models.recurrent import RecurrentConfig, RecurrentEncoder
from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.pooling import Pooling
from tameformer.shapes import Float, Real, Tokens


@dataclass(frozen=True, kw_only=True)
class RecurrentTextConfig(RecurrentConfig):
    """A recurrent classifier of texts, half of the width in each direction."""

    pooling: Literal["mean", "max", "attention"] = "mean"
    """How the states at all tokens become one classification."""
    head_dropout: float = 0.1
    """Probability of dropping a feature on its way into the head."""
    max_length: int = 256
    """Longest text, in tokens."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.head_dropout < 1:
            raise ValueError(f"expected 0 <= head_dropout < 1, got {self.head_dropout}; it is a probability")


class RecurrentTextClassifier(nn.Module):
    """Logits of the classes of a text; built by `recurrent_text_classifier`."""

    def __init__(
        self, embedding: TokenEmbedding, encoder: RecurrentEncoder, pooling: Pooling, dropout: float, head: nn.Linear
    ):
        super().__init__()
        self.embedding = embedding
        self.encoder = encoder
        self.pooling = pooling
        self.head_dropout = nn.Dropout(dropout)
        self.head = head

    def forward(self, tokens: Tokens, *, real: Real | None = None) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; `real` is True at real tokens, which come first; None says that none is padding."""
        states = self.encoder(self.embedding(tokens), real)
        return self.pooling(states, lambda x: self.head(self.head_dropout(x)), real)


def recurrent_text_classifier(
    config: RecurrentTextConfig, *, vocab_size: int, num_classes: int
) -> RecurrentTextClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> import torch
        >>> model = recurrent_text_classifier(RecurrentTextConfig(dim=32), vocab_size=65, num_classes=3)
        >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 3])
    """
    return RecurrentTextClassifier(
        TokenEmbedding(vocab_size, config.dim),
        RecurrentEncoder(config),
        PARTS["pooling"][config.pooling](config.dim),
        config.head_dropout,
        nn.Linear(config.dim, num_classes),
    )
