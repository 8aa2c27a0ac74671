"""Which patches of an image a masked autoencoder sees (He et al. 2022, arXiv:2111.06377, section 3, "Masking")."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.data.stream import Batch, Source
from tameformer.shapes import Int64


def visible_patches(
    keys: SampleKeys, num_patches: int, num_visible: int, salt: str = "patch mask"
) -> Int64[np.ndarray, "samples {num_visible}"]:
    """Numbers of the patches that stay, ascending, drawn without replacement by (seed, epoch, index).

    Example:
        >>> visible_patches(SampleKeys(0, 0, np.arange(2)), 16, 4).shape
        (2, 4)
    """
    order = uniforms(keys, num_patches, salt).argsort(axis=1, kind="stable")
    return np.sort(order[:, :num_visible], axis=1)


@dataclass(frozen=True, eq=False)
class MaskedPatches:
    """A source whose batches also name the patches to be seen, as `visible` (batch, visible) int64.

    Raises:
        ValueError: a mask ratio that leaves no patch to see, or none to hide.
    """

    source: Source
    """Images."""
    num_patches: int
    """Of an image."""
    mask_ratio: float
    """Share of the patches that are hidden."""

    def __post_init__(self) -> None:
        if not 0 < self.num_visible < self.num_patches:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} leaves {self.num_visible} of {self.num_patches} patches to see; "
                "choose one that leaves some to see and some to hide, or smaller patches"
            )

    @property
    def num_visible(self) -> int:
        """Patches seen, the same for every image."""
        return round(self.num_patches * (1 - self.mask_ratio))

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, keys: SampleKeys) -> Batch:
        """The samples, and what is seen of each."""
        visible: Tensor = torch.from_numpy(visible_patches(keys, self.num_patches, self.num_visible))
        return {**self.source.fetch(keys), "visible": visible}
