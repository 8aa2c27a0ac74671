"""Classifiers of films: a Transformer over tubelets (Arnab et al. 2021, "ViViT", arXiv:2103.15691, model 1), and convolutions.

The convolutional one is the residual network of `models.convolutional` with kernels over time, rows and columns (Tran et al.
2018, "R3D", arXiv:1711.11248).
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from tameformer.models.convolutional import ConvolutionalClassifier, ConvolutionalConfig
from tameformer.models.initialize import Initializer, vit_init
from tameformer.models.patch_encoder import PatchEncoder, PatchEncoderParts, patch_encoder_parts
from tameformer.models.stack import StackConfig
from tameformer.nn.stems.tubelet import Films, TubeletStem, tubelet_grid
from tameformer.shapes import Float


@dataclass(frozen=True, kw_only=True)
class VideoConfig(StackConfig):
    """A classifier of films over tubelets."""

    num_layers: int = 4
    """Layers."""
    tubelet_frames: int = 2
    """Frames of a tubelet; divides the film's frames."""
    patch_size: int = 4
    """Side of a tubelet, in pixels; divides the film's sides."""
    pooling: Literal["class_token", "mean", "max", "attention", "softmax"] = "mean"
    """How the outputs of all tokens become one classification."""


@dataclass(frozen=True, kw_only=True)
class ConvolutionalVideoConfig(ConvolutionalConfig):
    """A classifier of films by convolutions over time, rows and columns."""

    architecture: Literal["resnet3d", "cnn3d"] = "resnet3d"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which architecture this is: residual, or the same convolutions without shortcuts."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage; each stage but the first halves every side, and the number of frames."""


class VideoClassifier(PatchEncoder):
    """Logits of the classes of a film; built by `video_classifier`."""

    def __init__(self, parts: PatchEncoderParts, head: nn.Module, film_shape: tuple[int, int, int]):
        super().__init__(parts)
        self.head = head
        self.film_shape = film_shape

    def forward(self, films: Films) -> Float[Tensor, "batch classes"]:
        """The logits.

        Raises:
            ValueError: Films of another shape than the model was built for.
        """
        if tuple(films.shape[2:]) != self.film_shape:
            raise ValueError(
                f"expected films of {self.film_shape} (frames, rows, columns), got {tuple(films.shape[2:])}; cut and resize "
                "them, or build the model for them"
            )
        return self.pooling(self._outputs(self._tokens(films)), self.head)


def video_classifier(
    config: VideoConfig,
    *,
    num_classes: int,
    num_frames: int,
    image_size: tuple[int, int],
    channels: int,
    initialize: Initializer = vit_init,
) -> VideoClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`.

    Raises:
        ValueError: The tubelet does not divide the film.

    Example:
        >>> import torch
        >>> model = video_classifier(VideoConfig(dim=32), num_classes=4, num_frames=8, image_size=(16, 16), channels=1)
        >>> model(torch.zeros(3, 1, 8, 16, 16)).shape
        torch.Size([3, 4])
    """
    times, rows, columns = tubelet_grid(num_frames, image_size, config.tubelet_frames, config.patch_size)
    parts = patch_encoder_parts(
        config,
        lambda: TubeletStem(channels, config.tubelet_frames, config.patch_size, config.dim),
        pooling=config.pooling,
        num_layers=config.num_layers,
        num_patches=times * rows * columns,
    )
    shape = (num_frames, rows * config.patch_size, columns * config.patch_size)
    model = VideoClassifier(parts, nn.Linear(config.dim, num_classes), shape)
    initialize(model)
    return model


def convolutional_video_classifier(
    config: ConvolutionalVideoConfig, *, num_classes: int, num_frames: int, image_size: tuple[int, int], channels: int
) -> ConvolutionalClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`; it takes films of any shape.

    Example:
        >>> import torch
        >>> told = {"num_classes": 4, "num_frames": 8, "image_size": (16, 16), "channels": 1}
        >>> convolutional_video_classifier(ConvolutionalVideoConfig(), **told)(torch.zeros(3, 1, 8, 16, 16)).shape
        torch.Size([3, 4])
    """
    return ConvolutionalClassifier(nn.Conv3d, config, channels=channels, num_classes=num_classes)
