"""An image classifier over patches (Dosovitskiy et al. 2020, "ViT", arXiv:2010.11929)."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from tameformer.models.initialize import Initializer, vit_init
from tameformer.models.parts import PARTS
from tameformer.models.stack import Stack, StackConfig, added_positions, layer_stack
from tameformer.nn.pooling import Pooling
from tameformer.nn.stems import grid_size
from tameformer.shapes import Images, Stream


@dataclass(frozen=True, kw_only=True)
class VisionConfig(StackConfig):
    """An image classifier over patches."""

    num_layers: int = 4
    """Layers."""
    patch_size: int = 4
    """Side of a patch, in pixels; divides the image's sides."""
    stem: Literal["patch", "convolution"] = "patch"
    """How patches become tokens: one linear layer, or a few strided convolutions."""
    pooling: Literal["class_token", "mean", "max", "attention", "softmax"] = "class_token"
    """How the outputs of all tokens become one classification."""


class VisionClassifier(nn.Module):
    """Logits of the classes of an image; built by `vision_classifier`."""

    def __init__(
        self,
        stem: nn.Module,
        pooling: Pooling,
        positions: nn.Module | None,
        dropout: float,
        stack: Stack,
        head: nn.Module,
        image_size: tuple[int, int],
    ):
        super().__init__()
        self.stem = stem
        self.pooling = pooling
        self.positions = positions
        self.dropout = nn.Dropout(dropout)
        self.stack = stack
        self.head = head
        self.image_size = image_size

    def features(self, images: Images) -> Stream:
        """Outputs at all tokens, a class token first if there is one.

        Raises:
            ValueError: images of another size than the model was built for.
        """
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"expected images of {self.image_size[0]} x {self.image_size[1]}, got {images.shape[2]} x "
                f"{images.shape[3]}; resize them or build the model with their image_size"
            )
        x = self.pooling.extend(self.stem(images))
        if self.positions is not None:
            x = self.positions(x)
        return self.stack(self.dropout(x))

    def forward(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Logits of the classes."""
        return self.pooling(self.features(images), self.head)


def vision_classifier(
    config: VisionConfig,
    *,
    num_classes: int,
    image_size: int | tuple[int, int],
    channels: int,
    initialize: Initializer = vit_init,
) -> VisionClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Raises:
        ValueError: `patch_size` does not divide `image_size`, both in pixels.

    Example:
        >>> import torch
        >>> model = vision_classifier(VisionConfig(dim=32, patch_size=2), num_classes=10, image_size=8, channels=1)
        >>> model(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """
    rows, columns = grid_size(image_size, config.patch_size)
    pooling = PARTS["pooling"][config.pooling](config.dim)
    num_tokens = rows * columns + pooling.extra_tokens
    model = VisionClassifier(
        PARTS["stem"][config.stem](channels, config.patch_size, config.dim),
        pooling,
        added_positions(config, num_tokens),
        config.dropout,
        layer_stack(config, num_layers=config.num_layers, max_length=num_tokens),
        nn.Linear(config.dim, num_classes),
        (rows * config.patch_size, columns * config.patch_size),
    )
    initialize(model)
    return model
