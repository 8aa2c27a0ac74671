"""An image classifier over patches (Dosovitskiy et al. 2020, "ViT", arXiv:2010.11929)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tameformer.models.initialize import Initializer, vit_init
from tameformer.models.parts import PARTS
from tameformer.models.patch_encoder import PatchEncoder, PatchEncoderParts, patch_encoder_parts
from tameformer.models.stack import StackConfig
from tameformer.nn.stems import grid_size
from tameformer.shapes import Float, Images, Stream


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


class VisionClassifier(PatchEncoder):
    """Logits of the classes of an image; built by `vision_classifier`."""

    def __init__(self, parts: PatchEncoderParts, head: nn.Module, image_size: tuple[int, int]):
        super().__init__(parts)
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
        return self._outputs(self._tokens(images))

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
    model = VisionClassifier(
        image_encoder_parts(config, channels=channels, num_patches=rows * columns),
        nn.Linear(config.dim, num_classes),
        (rows * config.patch_size, columns * config.patch_size),
    )
    initialize(model)
    return model


def image_encoder_parts(config: VisionConfig, *, channels: int, num_patches: int) -> PatchEncoderParts:
    """Fresh parts of an encoder of images."""
    return patch_encoder_parts(
        config,
        lambda: PARTS["stem"][config.stem](channels, config.patch_size, config.dim),
        pooling=config.pooling,
        num_layers=config.num_layers,
        num_patches=num_patches,
    )
