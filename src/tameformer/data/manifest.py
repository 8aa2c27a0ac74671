"""Sound files with their texts, as a list in a file says."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tameformer.data.keys import SampleKeys
from tameformer.data.text import read_lines
from tameformer.errors import DataError, missing_extra
from tameformer.shapes import Int64


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
