"""Which samples, in which epoch, under which seed: all that a source is told and all that randomness may depend on."""

from dataclasses import dataclass, replace

import numpy as np

from tameformer.errors import DataError


@dataclass(frozen=True, eq=False)
class SampleKeys:
    """Names of samples; whatever is random about a sample is a pure function of (seed, epoch, index)."""

    seed: int
    """Data seed of the run."""
    epoch: int
    """Pass over the data, from 0."""
    indices: np.ndarray
    """Positions in the source, int64, shape (samples,)."""

    def __post_init__(self) -> None:
        if self.indices.ndim != 1 or self.indices.dtype != np.int64:
            raise ValueError(
                f"indices must be one row of int64, got {self.indices.dtype} of shape {self.indices.shape}; "
                "use np.asarray(indices, dtype=np.int64)"
            )

    def __len__(self) -> int:
        return len(self.indices)


def split(keys: SampleKeys, parts: int) -> list[SampleKeys]:
    """Cut into contiguous parts whose sizes differ by at most one, longer parts first.

    Raises:
        DataError: a part would be empty.

    Example:
        >>> [part.indices.tolist() for part in split(SampleKeys(0, 0, np.arange(5)), 2)]
        [[0, 1, 2], [3, 4]]
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}")
    if len(keys) < parts:
        raise DataError(
            f"a batch of {len(keys)} samples cannot be cut into {parts} parts (processes x accumulation): "
            "take a larger batch, fewer processes or less accumulation"
        )
    if parts == 1:
        return [keys]
    return [replace(keys, indices=part) for part in np.array_split(keys.indices, parts)]
