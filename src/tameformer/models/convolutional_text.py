"""A convolutional classifier of texts, for comparison (Kim 2014, "Convolutional Neural Networks for Sentence Classification").

arXiv:1408.5882, the variant whose word vectors start at random and are learned. Each filter looks at a few tokens beside each
other, and its largest answer in the text counts.

Differs from the paper: windows may begin before the text and end behind it, so that a text shorter than a window has one; no
bound on the norm of the output weights.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.models.stack import check_choices, check_probabilities
from tameformer.nn.embedding import TokenEmbedding
from tameformer.shapes import Float, Real, Tokens


@dataclass(frozen=True, kw_only=True)
class ConvolutionalTextConfig:
    """A convolutional classifier of texts."""

    architecture: Literal["cnn"] = "cnn"
    """Which architecture this is."""
    dim: int = 128
    """Width of a token's vector, in features."""
    kernels: tuple[int, ...] = (3, 4, 5)
    """Tokens that a filter looks at, one number a group of filters."""
    num_filters: int = 100
    """Filters of each group."""
    dropout: float = 0.0
    """Probability of dropping a feature of a token's vector."""
    head_dropout: float = 0.5
    """Probability of dropping a filter's answer on its way into the head."""
    max_length: int = 256
    """Longest text, in tokens."""

    def __post_init__(self):
        check_choices(self)
        check_probabilities(self, "dropout", "head_dropout")
        if not self.kernels or min(self.kernels) < 1:
            raise ValueError(f"expected kernels of at least 1 token, got {list(self.kernels)}")


class ConvolutionalTextClassifier(nn.Module):
    """Logits of the classes of a text; built by `convolutional_text_classifier`."""

    def __init__(self, embedding: TokenEmbedding, config: ConvolutionalTextConfig, num_classes: int):
        super().__init__()
        self.embedding = embedding
        self.dropout = nn.Dropout(config.dropout)
        self.kernels = config.kernels
        self.filters = nn.ModuleList(
            nn.Conv1d(config.dim, config.num_filters, width, padding=width - 1) for width in config.kernels
        )
        self.head_dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(config.num_filters * len(config.kernels), num_classes)

    def forward(self, tokens: Tokens, *, real: Real | None = None) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; `real` is True at real tokens, which come first; None says that none is padding."""
        x = self.dropout(self.embedding(tokens))
        if real is None:
            real = torch.ones_like(tokens, dtype=torch.bool)
        x = (x * real[:, :, None]).mT  # padding as what lies beyond a text
        answers = []
        for width, convolution in zip(self.kernels, self.filters, strict=True):
            found = F.relu(convolution(x))  # of the windows that end at each token, and of those behind the text
            # A window with no real token in it answers with its bias: that must not depend on the batch.
            ends = F.pad(real, (0, found.shape[2] - real.shape[1]))
            touches = torch.stack([ends.roll(shift, 1) for shift in range(width)]).any(0)
            answers.append((found * touches[:, None]).amax(2))
        return self.head(self.head_dropout(torch.cat(answers, dim=1)))


def convolutional_text_classifier(
    config: ConvolutionalTextConfig, *, vocab_size: int, num_classes: int
) -> ConvolutionalTextClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> model = convolutional_text_classifier(ConvolutionalTextConfig(dim=32), vocab_size=65, num_classes=3)
        >>> model(torch.zeros(2, 8, dtype=torch.long)).shape
        torch.Size([2, 3])
    """
    embedding = TokenEmbedding(vocab_size, config.dim)
    nn.init.uniform_(embedding.weight, -0.25, 0.25)
    return ConvolutionalTextClassifier(embedding, config, num_classes)
