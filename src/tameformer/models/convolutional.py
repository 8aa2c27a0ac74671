"""Convolutional classifiers, for comparison: a residual network for small images, and the same without shortcuts.

He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385, section 4.2.

Differs from the paper: group normalization (Wu and He 2018, arXiv:1803.08494) instead of batch normalization, so that the
outputs of an example do not depend on the others; shortcuts into a new width are 1x1 convolutions; the first convolution may
have another width than 16.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.models.stack import check_choices, check_probabilities
from tameformer.shapes import Float

Grid = Float[Tensor, "batch channels *grid"]
"""Images or films, channels first."""
Convolution = type[nn.Conv2d] | type[nn.Conv3d]


@dataclass(frozen=True, kw_only=True)
class ConvolutionalConfig:
    """A convolutional classifier."""

    architecture: Literal["resnet", "cnn"] = "resnet"
    """Which architecture this is: residual, or the same convolutions without shortcuts."""
    widths: tuple[int, ...] = (32, 64, 128)
    """Channels of each stage; each stage but the first halves every side."""
    blocks: int = 1
    """Blocks of a stage, of two convolutions each."""
    dropout: float = 0.0
    """Probability of dropping a feature before the classes."""

    def __post_init__(self):
        check_choices(self)
        check_probabilities(self, "dropout")
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"expected widths of at least 1, one a stage, got {list(self.widths)}")


class Block(nn.Module):
    """relu(shortcut(x) + norm(convolution(relu(norm(convolution(x)))))); without shortcut the sum has one term."""

    def __init__(self, convolution: Convolution, inputs: int, outputs: int, stride: int, *, is_residual: bool):
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride, padding=1, bias=False)
        self.first_norm = group_norm(outputs)
        self.second = convolution(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = group_norm(outputs)
        self.is_residual = is_residual
        changes = is_residual and (stride > 1 or inputs != outputs)
        self.shortcut = convolution(inputs, outputs, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Grid) -> Float[Tensor, "batch outputs *places"]:
        """The block's output, with every side divided by the stride and rounded up."""
        branch = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(self.shortcut(x) + branch if self.is_residual else branch)


class ConvolutionalClassifier(nn.Module):
    """Logits of the classes of an image or a film."""

    def __init__(self, convolution: Convolution, config: ConvolutionalConfig, *, channels: int, num_classes: int):
        super().__init__()
        width = config.widths[0]
        self.stem = nn.Sequential(convolution(channels, width, 3, padding=1, bias=False), group_norm(width), nn.ReLU())
        layers, inputs = [], width
        for stage, outputs in enumerate(config.widths):
            for block in range(config.blocks):
                stride = 2 if stage and not block else 1
                layers.append(
                    Block(convolution, inputs, outputs, stride, is_residual=config.architecture.startswith("resnet"))
                )
                inputs = outputs
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, images: Grid) -> Float[Tensor, "batch classes"]:
        """The logits, from the mean over all places."""
        x = self.stem(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(x.flatten(2).mean(-1)))


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of at least 8 channels where the width allows it, up to 8 of them."""
    return nn.GroupNorm(math.gcd(8, max(1, channels // 8)), channels)


def convolutional_classifier(
    config: ConvolutionalConfig, *, num_classes: int, image_size: int | tuple[int, int], channels: int
) -> ConvolutionalClassifier:
    """An image classifier with fresh weights, the same for the same `torch.manual_seed`; it takes images of any size.

    Example:
        >>> import torch
        >>> config = ConvolutionalConfig(widths=(8, 16))
        >>> model = convolutional_classifier(config, num_classes=10, image_size=8, channels=1)
        >>> model(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    return ConvolutionalClassifier(nn.Conv2d, config, channels=channels, num_classes=num_classes)
