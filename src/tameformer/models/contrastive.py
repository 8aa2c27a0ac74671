"""The image classifier with a projection in place of its classes (Chen et al. 2020, "SimCLR", arXiv:2002.05709, section 2)."""

from dataclasses import dataclass

from torch import nn

from tameformer.models.initialize import Initializer, vit_init
from tameformer.models.vision import VisionClassifier, VisionConfig, vision_classifier


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(VisionConfig):
    """The classifier's encoder, and a projection that only pre-training needs."""

    projection_dim: int = 64
    """Width of the vectors that are compared, in features."""


def contrastive_encoder(
    config: ContrastiveConfig,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    initialize: Initializer = vit_init,
) -> VisionClassifier:
    """A classifier whose head is the projection, linear, ReLU, linear; the same for the same `torch.manual_seed`.

    Raises:
        ValueError: `patch_size` does not divide `image_size`, both in pixels; or the pooling is softmax, which gives
            probabilities and no vectors.

    Example:
        >>> import torch
        >>> config = ContrastiveConfig(dim=32, num_layers=2, patch_size=2, projection_dim=16)
        >>> contrastive_encoder(config, image_size=8, channels=1)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 16])
    """
    if config.pooling == "softmax":
        raise ValueError(
            "pooling softmax gives probabilities, and vectors are compared here; choose mean or class_token"
        )
    model = vision_classifier(
        config,
        num_classes=config.projection_dim,
        image_size=image_size,
        channels=channels,
        initialize=lambda model: None,
    )
    model.head = nn.Sequential(
        nn.Linear(config.dim, config.dim), nn.ReLU(), nn.Linear(config.dim, config.projection_dim)
    )
    initialize(model)
    return model
