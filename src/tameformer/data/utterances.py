"""Spoken utterances with their texts: what every source of them gives."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.shapes import Int64


@runtime_checkable
class Utterances(Protocol):
    """Waves and what is said in them; both are functions of the sample."""

    @property
    def sample_rate(self) -> int:
        """Samples a second."""
        ...

    def __len__(self) -> int:
        """Utterances of an epoch."""
        ...

    def lengths(self, keys: SampleKeys) -> Int64[np.ndarray, " utterances"]:
        """Samples of each wave, without reading it."""
        ...

    def waves(self, keys: SampleKeys) -> list[np.ndarray]:
        """The waves, float32 in [-1, 1]."""
        ...

    def texts(self, keys: SampleKeys) -> list[str]:
        """What is said."""
        ...

    def name(self, index: int) -> str:
        """What errors call an utterance."""
        ...


def all_keys(utterances: Utterances, seed: int, epoch: int) -> SampleKeys:
    """The keys of a whole epoch, in order."""
    return SampleKeys(seed, epoch, np.arange(len(utterances), dtype=np.int64))


def alphabet(utterances: Sequence[Utterances]) -> str:
    """The characters that their texts of the first epoch have, each once."""
    texts = [text for part in utterances for text in part.texts(all_keys(part, 0, 0))]
    return "".join(sorted(set("".join(texts))))
