"""A classifier of sets: no positions, so that the order of the elements does not matter.

Zaheer et al. 2017, "Deep Sets", arXiv:1703.06114; Lee et al. 2018, "Set Transformer", arXiv:1810.00825, without its inducing
points.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tameformer.models.initialize import Initializer, xavier_init
from tameformer.models.parts import PARTS
from tameformer.models.stack import Stack, StackConfig, check_probabilities, layer_stack
from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.masks import padding_mask
from tameformer.nn.pooling import Pooling
from tameformer.shapes import Float, Int, Real


@dataclass(frozen=True, kw_only=True)
class SetConfig(StackConfig):
    """A classifier of sets."""

    positions: Literal["none"] = "none"  # pyright: ignore[reportIncompatibleVariableOverride]
    """A set has none."""
    elements: Literal["tokens", "vectors"] = "vectors"
    """Whether elements are numbers of a vocabulary, or real vectors."""
    num_layers: int = 2
    """Layers."""
    pooling: Literal["class_token", "mean", "max", "attention", "softmax"] = "attention"
    """How the outputs of all elements become one classification."""

    def __post_init__(self):
        super().__post_init__()
        if self.attention == "windowed":
            raise ValueError(
                "expected attention full, linear or collaborative for sets, got windowed: it knows an order"
            )


@dataclass(frozen=True, kw_only=True)
class TokenSetConfig(SetConfig):
    """A classifier of texts that takes each for the multiset of its tokens: how often they occur, and not in which order."""

    architecture: Literal["set"] = "set"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which architecture this is."""
    elements: Literal["tokens"] = "tokens"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Elements are numbers of a vocabulary."""
    head_dropout: float = 0.1
    """Probability of dropping a feature on its way into the head."""
    max_length: int = 256
    """Longest text, in tokens."""

    def __post_init__(self):
        super().__post_init__()
        check_probabilities(self, "head_dropout")


class SetClassifier(nn.Module):
    """Logits of the classes of a set, the same for every order of its elements; built by `set_classifier`."""

    def __init__(
        self,
        stem: nn.Module,
        pooling: Pooling,
        dropout: float,
        stack: Stack,
        head: nn.Linear,
        *,
        head_dropout: float = 0.0,
    ):
        super().__init__()
        self.stem = stem
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.head_dropout = nn.Dropout(head_dropout)
        self.head = head

    def features(
        self, elements: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq width"], *, real: Real | None = None
    ) -> Float[Tensor, "batch extended dim"]:
        """Outputs at all elements, in their order, a class token first if there is one."""
        x = self.pooling.extend(self.stem(elements))
        return self.stack(self.dropout(x), mask=None if real is None else padding_mask(self._extended(real)))

    def forward(
        self, elements: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq width"], *, real: Real | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the classes; `real` is True at real elements, None says that none is padding."""
        features = self.features(elements, real=real)
        real = None if real is None else self._extended(real)
        return self.pooling(features, lambda x: self.head(self.head_dropout(x)), real)

    def _extended(self, real: Tensor) -> Tensor:
        extra = self.pooling.extra_tokens
        return torch.cat([real.new_ones(len(real), extra), real], 1) if extra else real


def set_classifier(
    config: SetConfig, *, input_size: int, num_classes: int, initialize: Initializer = xavier_init
) -> SetClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Args:
        config: its shape.
        input_size: size of the vocabulary where elements are tokens, width of an element where they are vectors.
        num_classes: classes.
        initialize: sets the weights.

    Example:
        >>> model = set_classifier(SetConfig(dim=16), input_size=3, num_classes=10)
        >>> model(torch.zeros(2, 50, 3)).shape
        torch.Size([2, 10])
    """
    is_tokens = config.elements == "tokens"
    model = SetClassifier(
        TokenEmbedding(input_size, config.dim, scale=config.dim**0.5)
        if is_tokens
        else nn.Linear(input_size, config.dim),
        PARTS["pooling"][config.pooling](config.dim),
        config.dropout,
        layer_stack(config, num_layers=config.num_layers, max_length=1),
        nn.Linear(config.dim, num_classes),
        head_dropout=config.head_dropout if isinstance(config, TokenSetConfig) else 0.0,
    )
    initialize(model)
    return model


def token_set_classifier(config: TokenSetConfig, *, vocab_size: int, num_classes: int) -> SetClassifier:
    """The same for texts, in the place of a `text_classifier`.

    Example:
        >>> model = token_set_classifier(TokenSetConfig(dim=16), vocab_size=65, num_classes=2).eval()
        >>> bool(torch.allclose(model(torch.tensor([[3, 3, 7]])), model(torch.tensor([[7, 3, 3]])), atol=1e-6))
        True
    """
    return set_classifier(config, input_size=vocab_size, num_classes=num_classes)
