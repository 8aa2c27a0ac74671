"""Recordings of single digits, joined into sequences."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.errors import DataError
from tameformer.shapes import Int64

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, eq=False)
class DigitSequences:
    """Recordings of single digits joined into sequences, with pauses between: new ones in every epoch.

    A sequence has one speaker. Number of digits, digits, recordings and pauses are functions of (seed, epoch, index).
    """

    audio: np.ndarray
    """int16, all recordings one after the other."""
    starts: np.ndarray
    """First sample of each recording, int64."""
    stops: np.ndarray
    """The sample after its last."""
    labels: np.ndarray
    """The digit of each recording."""
    speakers: np.ndarray
    """Its speaker."""
    sample_rate: int = field(kw_only=True)
    """Samples a second."""
    num_samples: int = field(kw_only=True)
    """Sequences of an epoch."""
    longest: int = field(kw_only=True, default=5)
    """Digits of the longest sequence."""
    pause_seconds: float = field(kw_only=True, default=0.1)
    """Longest pause before, between and behind the digits; the shortest is half of it."""
    salt: str = field(kw_only=True, default="digits")
    """Name of the random numbers; another one gives other sequences."""

    def __post_init__(self) -> None:
        if self.longest < 1 or self.num_samples < 1:
            raise ValueError(f"longest and num_samples must be at least 1, got {self.longest} and {self.num_samples}")
        if not len(self.labels):
            raise DataError("there are no recordings of digits in this part of the data; take a larger share")

    def __len__(self) -> int:
        return self.num_samples

    def take(self, recordings: np.ndarray, **changes: Any) -> "DigitSequences":
        """Sequences of these recordings only."""
        return replace(
            self,
            starts=self.starts[recordings],
            stops=self.stops[recordings],
            labels=self.labels[recordings],
            speakers=self.speakers[recordings],
            **changes,
        )

    def lengths(self, keys: SampleKeys) -> Int64[np.ndarray, " utterances"]:
        """Samples of each sequence, pauses included."""
        sizes = self.stops - self.starts
        return np.array([sizes[chosen].sum() + pauses.sum() for chosen, pauses in self._parts(keys)], dtype=np.int64)

    def waves(self, keys: SampleKeys) -> list[np.ndarray]:
        """Pause, digit, pause, ..., digit, pause."""
        found = []
        for chosen, pauses in self._parts(keys):
            pieces = [np.zeros(pauses[0], dtype=np.float32)]
            for recording, pause in zip(chosen, pauses[1:], strict=True):
                digit = self.audio[self.starts[recording] : self.stops[recording]]
                pieces += [digit.astype(np.float32) / 32768, np.zeros(pause, dtype=np.float32)]
            found.append(np.concatenate(pieces))
        return found

    def texts(self, keys: SampleKeys) -> list[str]:
        """The digits in words."""
        return [" ".join(DIGITS[self.labels[recording]] for recording in chosen) for chosen, _ in self._parts(keys)]

    def name(self, index: int) -> str:
        """Its number."""
        return f"sequence {index}"

    def _parts(self, keys: SampleKeys) -> list[tuple[np.ndarray, np.ndarray]]:
        """Recordings and pauses, in samples, of each sequence."""
        u = uniforms(keys, 2 * self.longest + 3, self.salt)
        counts = 1 + (u[:, 0] * self.longest).astype(np.int64)
        own = [self._by_speaker[int(number * len(self._by_speaker))] for number in u[:, 1]]
        pauses = (self.sample_rate * self.pause_seconds * (0.5 + 0.5 * u[:, 2 : 3 + self.longest])).astype(np.int64)
        picks = u[:, 3 + self.longest :]
        return [
            (known[(row[:count] * len(known)).astype(np.int64)], between[: count + 1])
            for known, row, between, count in zip(own, picks, pauses, counts.tolist(), strict=True)
        ]

    @cached_property
    def _by_speaker(self) -> list[np.ndarray]:
        return [np.flatnonzero(self.speakers == speaker) for speaker in np.unique(self.speakers)]


def spoken_digits(path: str | Path, split: str, **settings: Any) -> DigitSequences:
    """Sequences of the recordings of one split of an archive of spoken digits.

    The archive is an `.npz` with `audio` (int16, all recordings), `offsets` (recording i is
    `audio[offsets[i]:offsets[i + 1]]`), `label`, `speaker`, `is_test` and `sample_rate`, as made
    from the Free Spoken Digit Dataset.

    Args:
        path: The archive.
        split: `train` or `test`, by `is_test`.
        settings: Those of `DigitSequences`.

    Raises:
        DataError: The file is missing or no such archive.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} does not exist; give an .npz of spoken digits, or a manifest (--data.source manifest)")
    try:
        with np.load(file, allow_pickle=False) as archive:
            wanted = ("audio", "offsets", "label", "speaker", "is_test", "sample_rate")
            found = {name: archive[name] for name in wanted if name in archive.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}; write it with numpy.savez") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{file} has no field {missing[0]!r}; an archive of spoken digits has {', '.join(wanted)}")
    offsets, label = found["offsets"].astype(np.int64), found["label"].astype(np.int64)
    if found["audio"].dtype != np.int16 or len(offsets) != len(label) + 1 or offsets[-1] > len(found["audio"]):
        raise DataError(
            f"{file}: expected int16 audio and one offset more than labels within it, got {found['audio'].dtype}, "
            f"{len(offsets)} offsets up to {offsets[-1]}, {len(label)} labels and {len(found['audio'])} samples"
        )
    if len(label) and not (label.min() >= 0 and label.max() < len(DIGITS)):
        raise DataError(f"{file}: labels must be digits 0..9, got {label.min()}..{label.max()}")
    every = DigitSequences(
        found["audio"],
        offsets[:-1],
        offsets[1:],
        label,
        found["speaker"].astype(np.int64),
        sample_rate=int(found["sample_rate"]),
        **settings,
    )
    return every.take(np.flatnonzero(found["is_test"].astype(bool) == (split == "test")))


def hold_out(utterances: DigitSequences, share: float, **settings: Any) -> tuple[DigitSequences, DigitSequences]:
    """Sequences of most recordings, and of every 1 / share-th recording: of all digits and speakers where these lie in order.

    Args:
        utterances: The recordings.
        share: Of the recordings, in (0, 0.5].
        settings: Of the part held out.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"share must lie in (0, 0.5], got {share}")
    places = np.arange(len(utterances.labels))
    part = places % round(1 / share) == 0
    return utterances.take(places[~part]), utterances.take(places[part], **settings)
