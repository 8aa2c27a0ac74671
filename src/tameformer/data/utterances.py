"""Spoken utterances with their texts: sound files that a manifest lists, and digits joined into sequences."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.data.text import read_lines
from tameformer.errors import DataError, missing_extra
from tameformer.shapes import Int64

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


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


@dataclass(frozen=True, eq=False)
class Manifest:
    """Sound files and their texts, as a list in a file says.

    A `.tsv` has a path, a tab and the text in each line; a `.jsonl` has objects with `path` (or `audio`) and `text`. Paths are
    relative to the manifest. Files are read when they are asked for; all have one channel and one sample rate.

    Raises:
        DataError: The manifest, line or file that is wrong, and the remedy.
    """

    path: Path
    """The manifest."""

    @cached_property
    def entries(self) -> list[tuple[Path, str]]:
        """File and text of each utterance."""
        entries = []
        for number, line in enumerate(read_lines(self.path), start=1):
            file, text = self._entry(number, line)
            if not text.strip():
                raise DataError(f"{self.path}, line {number}: the text is empty; write it, or drop the line")
            entries.append((self.path.parent / file, text.strip()))
        if not entries:
            raise DataError(f"{self.path} lists no utterances; write PATH, a tab and TEXT into each line")
        return entries

    def _entry(self, number: int, line: str) -> tuple[str, str]:
        where = f"{self.path}, line {number}"
        if self.path.name.removesuffix(".gz").endswith(".jsonl"):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON ({error}): {line[:60]!r}; write one object a line") from error
            file = record.get("path", record.get("audio")) if isinstance(record, dict) else None
            if not isinstance(file, str) or not isinstance(record.get("text"), str):
                raise DataError(f"{where}: expected the keys path and text with strings, got {line[:60]!r}")
            return file, record["text"]
        columns = line.split("\t")
        if len(columns) != 2:
            raise DataError(f"{where}: expected a path, a tab and a text, got {len(columns)} columns: {line[:60]!r}")
        return columns[0], columns[1]

    @cached_property
    def _header(self) -> tuple[int, np.ndarray]:
        """The sample rate, and the samples of each file."""
        rates, counts = [], []
        for file, _ in self.entries:
            info = _readable(file, soundfile().info)
            if info.channels != 1:
                raise DataError(f"{file} has {info.channels} channels; mix them down to one: sox {file.name} -c 1 OUT")
            rates.append(info.samplerate)
            counts.append(info.frames)
            if info.samplerate != rates[0]:
                raise DataError(
                    f"{file} has {info.samplerate} samples a second, {self.entries[0][0]} has {rates[0]}; "
                    f"resample it: sox {file.name} -r {rates[0]} OUT"
                )
            if not info.frames:
                raise DataError(f"{file} has no samples; drop its line from {self.path}")
        return rates[0], np.array(counts, dtype=np.int64)

    @property
    def sample_rate(self) -> int:
        """Samples a second, the same in all files."""
        return self._header[0]

    def __len__(self) -> int:
        return len(self.entries)

    def lengths(self, keys: SampleKeys) -> Int64[np.ndarray, " utterances"]:
        """Samples of each file, from its header."""
        return self._header[1][keys.indices]

    def waves(self, keys: SampleKeys) -> list[np.ndarray]:
        """The files' samples."""
        read = soundfile().read
        return [
            _readable(self.entries[index][0], lambda file: read(file, dtype="float32"))[0]
            for index in keys.indices.tolist()
        ]

    def texts(self, keys: SampleKeys) -> list[str]:
        """The texts."""
        return [self.entries[index][1] for index in keys.indices.tolist()]

    def name(self, index: int) -> str:
        """The file."""
        return str(self.entries[index][0])


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


def soundfile() -> Any:
    """The package that reads sound files.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        import soundfile as package
    except ImportError:
        raise missing_extra("soundfile", "speech") from None
    return package


def _readable(file: Path, read: Any) -> Any:
    if not file.is_file():
        raise DataError(f"{file} does not exist; paths in a manifest are relative to it")
    try:
        return read(str(file))
    except (OSError, RuntimeError) as error:  # soundfile's own error is a RuntimeError
        raise DataError(f"{file} cannot be read as sound: {error}; WAV and FLAC can be") from error


def all_keys(utterances: Utterances, seed: int, epoch: int) -> SampleKeys:
    """The keys of a whole epoch, in order."""
    return SampleKeys(seed, epoch, np.arange(len(utterances), dtype=np.int64))


def alphabet(utterances: Sequence[Utterances]) -> str:
    """The characters that their texts of the first epoch have, each once."""
    texts = [text for part in utterances for text in part.texts(all_keys(part, 0, 0))]
    return "".join(sorted(set("".join(texts))))
