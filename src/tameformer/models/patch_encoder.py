"""From pixels to the outputs at their patches: what models of images and of films begin with."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from tameformer.models.parts import PARTS
from tameformer.models.stack import Stack, StackConfig, added_positions, layer_stack
from tameformer.nn.pooling import Pooling
from tameformer.shapes import Float, Stream, Tokens

Pixels = Float[Tensor, "batch channels *sides"]


class PatchEncoderParts(NamedTuple):
    """What a `PatchEncoder` is put together from; see `patch_encoder_parts`."""

    stem: nn.Module
    pooling: Pooling
    positions: nn.Module | None
    dropout: float
    stack: Stack


class PatchEncoder(nn.Module):
    """Stem, positions and stack, and a pooling that may bring tokens of its own. What is made of the outputs, heirs say."""

    def __init__(self, parts: PatchEncoderParts):
        super().__init__()
        self.stem = parts.stem
        self.pooling = parts.pooling
        self.positions = parts.positions
        self.dropout = nn.Dropout(parts.dropout)
        self.stack = parts.stack

    def _tokens(self, pixels: Pixels) -> Stream:
        """The embeddings of all patches, the pooling's own tokens in front."""
        return self.pooling.extend(self.stem(pixels))

    def _outputs(self, tokens: Stream, places: Tokens | None = None) -> Stream:
        """The stack's outputs at these tokens, which stand at `places`; None is one after the other."""
        if self.positions is not None:
            tokens = self.positions(tokens, places)
        return self.stack(self.dropout(tokens), positions=places)


def patch_encoder_parts(
    config: StackConfig, stem: Callable[[], nn.Module], *, pooling: str, num_layers: int, num_patches: int
) -> PatchEncoderParts:
    """Fresh parts.

    Args:
        config: Of a layer.
        stem: Builds what makes embeddings of patches.
        pooling: A name in `PARTS`.
        num_layers: Layers.
        num_patches: Of one image or film.
    """
    pooled = PARTS["pooling"][pooling](config.dim)
    num_tokens = num_patches + pooled.extra_tokens
    return PatchEncoderParts(
        stem(),
        pooled,
        added_positions(config, num_tokens),
        config.dropout,
        layer_stack(config, num_layers=num_layers, max_length=num_tokens),
    )
