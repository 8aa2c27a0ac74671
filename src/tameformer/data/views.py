"""Two random views of every image, for learning what they have in common (Chen et al. 2020, "SimCLR", arXiv:2002.05709)."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from tameformer.data.keys import SampleKeys
from tameformer.data.stream import Batch


@dataclass(frozen=True, eq=False)
class TwoViews:
    """A source whose `images` hold a first view of every sample, then a second one: (2 batch, channels, height, width).

    The second has the same augmentations with random numbers of its own, also by (seed, epoch, index).

    Raises:
        ValueError: the source has no augmentations: both views would be the same.
    """

    source: Any
    """Images, with augmentations `transforms` that have a `salt` each."""

    def __post_init__(self) -> None:
        if not self.source.transforms:
            raise ValueError("two views need augmentations, and data.augment is empty; give some, such as resized_crop")
        again = tuple(replace(one, salt=f"{one.salt}, second view") for one in self.source.transforms)
        object.__setattr__(self, "_second", replace(self.source, transforms=again))

    def __len__(self) -> int:
        return len(self.source)

    def fetch(self, keys: SampleKeys) -> Batch:
        """Both views, and the number of samples."""
        first, second = self.source.fetch(keys), self._second.fetch(keys)  # pyright: ignore[reportAttributeAccessIssue]
        return {"images": torch.cat([first["images"], second["images"]]), "num_items": first["num_items"]}
