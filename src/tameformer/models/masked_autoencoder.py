"""An autoencoder of images most of which it does not see (He et al. 2022, "Masked Autoencoders", arXiv:2111.06377).

The encoder is the image classifier's and has its names, so that what was learned is handed over as it is; it works on the
visible patches only. A light decoder puts one learned token at each hidden place and predicts pixels.

Differs from the paper: hidden pixels are black before the stem, so that stems whose convolutions overlap see nothing of
them; positions are those of the classifier, whichever were chosen.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tameformer.models.initialize import Initializer, vit_init
from tameformer.models.patch_encoder import PatchEncoder, PatchEncoderParts
from tameformer.models.stack import Stack, added_positions, layer_stack
from tameformer.models.vision import VisionConfig, image_encoder_parts
from tameformer.nn.stems import grid_size
from tameformer.nn.stems.patch import to_patches, to_pixels
from tameformer.shapes import Float, Images, Int, Stream

Visible = Int[Tensor, "batch visible"]
Predictions = Float[Tensor, "batch patches pixels"]
_EPSILON = 1e-6  # of the authors' code


@dataclass(frozen=True, kw_only=True)
class MaskedAutoencoderConfig(VisionConfig):
    """The classifier's encoder, and a decoder of its own."""

    decoder_dim: int = 64
    """Width of the decoder, in features."""
    decoder_num_layers: int = 1
    """Layers of the decoder."""
    decoder_num_heads: int = 4
    """Attention heads of a layer of the decoder; divides decoder_dim."""


class MaskedAutoencoder(PatchEncoder):
    """Predicted pixels of every patch; built by `masked_autoencoder`."""

    def __init__(
        self,
        parts: PatchEncoderParts,
        config: MaskedAutoencoderConfig,
        *,
        decoder_positions: nn.Module | None,
        decoder: Stack,
        channels: int,
        grid: tuple[int, int],
    ):
        super().__init__(parts)
        self.to_decoder = nn.Linear(config.dim, config.decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(config.decoder_dim))
        self.decoder_positions = decoder_positions
        self.decoder = decoder
        self.to_pixels = nn.Linear(config.decoder_dim, channels * config.patch_size**2)
        self.grid = grid
        self.patch_size = config.patch_size

    @property
    def num_patches(self) -> int:
        """Of an image."""
        return self.grid[0] * self.grid[1]

    def features(self, images: Images) -> Stream:
        """The encoder's outputs at all tokens of whole images, a class token first if there is one."""
        return self._outputs(self._tokens(images))

    def encode(self, images: Images, visible: Visible) -> Stream:
        """The encoder's outputs at the visible patches, a class token first if there is one."""
        extra = self.pooling.extra_tokens
        tokens = self._tokens(self.hide(images, visible))
        first = torch.arange(extra, device=visible.device).expand(len(visible), -1)
        places = torch.cat([first, visible + extra], dim=1)
        return self._outputs(tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2])), places)

    def hide(self, images: Images, visible: Visible) -> Images:
        """The images with 0 at all hidden patches."""
        seen = images.new_zeros(len(images), self.num_patches).scatter(1, visible, 1.0)
        size = self.patch_size
        return images * seen.view(-1, 1, *self.grid).repeat_interleave(size, 2).repeat_interleave(size, 3)

    def forward(self, images: Images, visible: Visible) -> Predictions:
        """Predicted pixels of all patches, in the layout of `to_patches`, from the visible ones."""
        x = self.to_decoder(self.encode(images, visible))
        extra = self.pooling.extra_tokens
        everywhere = self.mask_token.to(x.dtype).expand(len(x), self.num_patches, -1)
        places = visible[..., None].expand(-1, -1, x.shape[2])
        x = torch.cat([x[:, :extra], everywhere.scatter(1, places, x[:, extra:])], dim=1)
        if self.decoder_positions is not None:
            x = self.decoder_positions(x)
        return self.to_pixels(self.decoder(x)[:, extra:])


def patch_targets(images: Images, patch_size: int, *, normalize: bool) -> Predictions:
    """What is to be predicted: the pixels, of each patch minus their mean and over their deviation if `normalize`."""
    patches = to_patches(images, patch_size)
    if not normalize:
        return patches
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + _EPSILON).sqrt()


def hidden_error(predictions: Predictions, targets: Predictions, visible: Visible) -> Float[Tensor, ""]:
    """Mean squared error over the hidden patches of an image, summed over the images; in float32 or wider.

    Example:
        >>> predictions, targets = torch.tensor([[[9.0], [1.0], [2.0]]]), torch.zeros(1, 3, 1)
        >>> hidden_error(predictions, targets, torch.tensor([[0]]))  # (1 + 4) / 2
        tensor(2.5000)
    """
    error = (predictions - targets).to(torch.promote_types(predictions.dtype, torch.float32)).square().mean(-1)
    hidden = torch.ones_like(error).scatter(1, visible, 0.0)
    return (error * hidden).sum() / hidden[0].sum()


def reconstruction(
    images: Images, predictions: Predictions, visible: Visible, patch_size: int, *, normalized: bool
) -> Images:
    """The images with the predictions in place of all hidden patches.

    Predictions of normalized patches get the mean and the deviation of the true patch, which only the loss has seen.
    """
    patches = to_patches(images, patch_size)
    if normalized:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predictions = predictions * (variance + _EPSILON).sqrt() + mean
    kept = visible[..., None].expand(-1, -1, patches.shape[2])
    grid = grid_size((images.shape[2], images.shape[3]), patch_size)
    return to_pixels(predictions.scatter(1, kept, patches.gather(1, kept)), grid, patch_size)


def masked_autoencoder(
    config: MaskedAutoencoderConfig,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    initialize: Initializer = vit_init,
) -> MaskedAutoencoder:
    """A masked autoencoder with fresh weights, the same for the same `torch.manual_seed`.

    Raises:
        ValueError: `patch_size` does not divide `image_size`, both in pixels; `decoder_num_heads` not `decoder_dim`.

    Example:
        >>> config = MaskedAutoencoderConfig(dim=32, num_layers=2, patch_size=2, decoder_dim=16)
        >>> model = masked_autoencoder(config, image_size=8, channels=1)
        >>> model(torch.zeros(3, 1, 8, 8), torch.tensor([[0, 5, 9, 15]]).expand(3, -1)).shape
        torch.Size([3, 16, 4])
    """
    rows, columns = grid_size(image_size, config.patch_size)
    parts = image_encoder_parts(config, channels=channels, num_patches=rows * columns)
    num_tokens = rows * columns + parts.pooling.extra_tokens
    narrow = replace(
        config, dim=config.decoder_dim, num_heads=config.decoder_num_heads, num_kv_heads=None, hidden_dim=None
    )
    model = MaskedAutoencoder(
        parts,
        config,
        decoder_positions=added_positions(narrow, num_tokens),
        decoder=layer_stack(narrow, num_layers=config.decoder_num_layers, max_length=num_tokens),
        channels=channels,
        grid=(rows, columns),
    )
    initialize(model)
    nn.init.normal_(model.mask_token, std=0.02)
    return model
