"""Sentence pairs for translation: read with line i on line i, or refused; padded to the longest of the batch."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.text import read_lines
from tameformer.data.tokenizers import BPETokenizer
from tameformer.data.windows import IGNORED
from tameformer.errors import DataError
from tameformer.shapes import Bool, Int64, Integer

logger = logging.getLogger(__name__)

Action = Literal["refuse", "drop"]


def read_pairs(source_path: str | Path, target_path: str | Path, *, empty: Action = "refuse") -> list[tuple[str, str]]:
    """(source, target) sentences of two parallel files, line by line.

    Args:
        source_path: File of source sentences, one a line, plain or `.gz`.
        target_path: File of their translations.
        empty: What to do with pairs of which a side has no text: refuse the files, or drop the pair and log how many.

    Raises:
        DataError: The numbers of lines differ, a side is empty and `empty` is "refuse", or a file cannot be read.
    """
    source, target = read_lines(source_path), read_lines(target_path)
    if len(source) != len(target):
        raise DataError(
            f"{source_path} has {len(source)} lines and {target_path} has {len(target)}; "
            "expected line i of one to be the translation of line i of the other: take both from the same release"
        )
    return _with_text(list(zip(source, target, strict=True)), (str(source_path), str(target_path)), empty)


def read_pairs_tsv(
    path: str | Path, *, columns: tuple[int, int] | None = None, empty: Action = "refuse"
) -> list[tuple[str, str]]:
    """(source, target) sentences of one file, in two of its columns.

    Args:
        path: The file, plain or `.gz`; a tab between columns.
        columns: Those of the sources and of their translations, from 1; None expects two, in this order.
        empty: As for `read_pairs`.

    Raises:
        DataError: A line has other columns, a side is empty and `empty` is "refuse", or the file cannot be read.
        ValueError: The two columns are one, or below 1.
    """
    source, target = columns or (1, 2)
    if source == target or min(source, target) < 1:
        raise ValueError(f"columns must be two different numbers from 1, got {source} and {target}")
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        cells = line.split("\t")
        if columns is None and len(cells) != 2:
            raise DataError(
                f"{path}, line {number}: expected 2 columns with a tab between, got {len(cells)}: {line[:60]!r}; "
                "say which two are meant (--data.columns '[1,2]'), or keep the two sentences only: cut -f 1,2"
            )
        if len(cells) < max(source, target):
            raise DataError(
                f"{path}, line {number}: expected columns {source} and {target}, got {len(cells)} with tabs between: "
                f"{line[:60]!r}"
            )
        pairs.append((cells[source - 1], cells[target - 1]))
    return _with_text(pairs, (f"{path} (column {source})", f"{path} (column {target})"), empty)


class PairSource:
    """Tokenised pairs as translation batches.

    A source ends with the end token. The decoder reads begin + target and is to predict target + end. What is longer
    than `max_length`, end token included, is dropped and counted in the log, or refused: the words of a cut sentence
    would have no counterpart. `kept` names the pairs that remain, by their place in what was passed.
    """

    def __init__(
        self,
        source: Sequence[Integer[np.ndarray, " source"]],
        target: Sequence[Integer[np.ndarray, " target"]],
        *,
        padding_id: int,
        begin_id: int,
        end_id: int,
        max_length: int | None = None,
        too_long: Action = "drop",
        multiple: int = 1,
    ):
        """Pairs of token ids without special tokens.

        Args:
            source: Ids of the sentences to translate.
            target: Ids of their translations.
            padding_id: Fills up `source` and `target_in`.
            begin_id: First input of the decoder.
            end_id: Last token of a source, and last target.
            max_length: Longest source or target, end token included; None means any.
            too_long: What to do with longer pairs.
            multiple: Pad lengths up to a multiple of this (8 suits tensor cores and compiled kernels).

        Raises:
            DataError: The numbers of sentences differ, or no pair remains, or one is too long and refused.
        """
        if len(source) != len(target):
            raise DataError(f"expected as many sources as targets, got {len(source)} and {len(target)}")
        if multiple < 1:
            raise ValueError(f"multiple must be at least 1, got {multiple}")
        self.padding_id, self.begin_id, self.end_id, self.multiple = padding_id, begin_id, end_id, multiple
        lengths = np.array([[len(one) + 1, len(other) + 1] for one, other in zip(source, target, strict=True)])
        lengths = lengths.astype(np.int64).reshape(-1, 2)
        self.kept = _short_enough(lengths, max_length, too_long)
        self.lengths: Int64[np.ndarray, "pairs 2"] = lengths[self.kept]
        """Tokens of source and target, end token included: what `TokenBuckets` needs."""
        end, begin = np.array([end_id]), np.array([begin_id])
        self._source = _Ragged([part for index in self.kept for part in (source[index], end)], self.lengths[:, 0])
        self._target = _Ragged(
            [part for index in self.kept for part in (begin, target[index], end)], self.lengths[:, 1] + 1
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def fetch(self, keys: SampleKeys) -> dict[str, Tensor | int]:
        """`source` and `source_mask` (batch, query), `target_in` and `targets` (batch, seq), and `num_items`.

        Padded to the longest of the batch on each side. `source_mask` is True at real tokens; targets are -100 at
        padding.
        """
        widths = self.lengths[keys.indices].max(axis=0)
        source_width, target_width = -(-widths // self.multiple) * self.multiple
        source, source_mask = self._source.padded(keys.indices, source_width, self.padding_id)
        target, target_mask = self._target.padded(keys.indices, target_width + 1, self.padding_id)
        real = target_mask[:, 1:]
        return {
            "source": torch.from_numpy(source),
            "source_mask": torch.from_numpy(source_mask),
            "target_in": torch.from_numpy(np.where(real, target[:, :-1], self.padding_id)),
            "targets": torch.from_numpy(np.where(real, target[:, 1:], IGNORED)),
            "num_items": int(real.sum()),
        }


def tokenized_pairs(
    pairs: Sequence[tuple[str, str]],
    tokenizer: BPETokenizer,
    *,
    max_length: int | None = None,
    too_long: Action = "drop",
    multiple: int = 1,
) -> PairSource:
    """The pairs as a source, both sides through one joint tokenizer; arguments as `PairSource`."""
    return PairSource(
        tokenizer.encode_batch([source for source, _ in pairs]),
        tokenizer.encode_batch([target for _, target in pairs]),
        padding_id=tokenizer.padding_id,
        begin_id=tokenizer.begin_id,
        end_id=tokenizer.end_id,
        max_length=max_length,
        too_long=too_long,
        multiple=multiple,
    )


class _Ragged:
    """Rows of different lengths, kept end to end."""

    def __init__(self, parts: list[np.ndarray], lengths: Int64[np.ndarray, " rows"]):
        self._flat = np.concatenate(parts).astype(np.int32)
        self._lengths = lengths
        self._begins = np.cumsum(lengths) - lengths

    def padded(
        self, rows: Int64[np.ndarray, " batch"], width: int | np.integer, filler: int
    ) -> tuple[Int64[np.ndarray, "batch width"], Bool[np.ndarray, "batch width"]]:
        """The rows filled up to a width, and where they are real."""
        columns = np.arange(width)
        real = columns < self._lengths[rows, None]
        places = np.where(real, self._begins[rows, None] + columns, 0)
        return np.where(real, self._flat[places], filler).astype(np.int64), real


def _with_text(pairs: list[tuple[str, str]], names: tuple[str, str], empty: Action) -> list[tuple[str, str]]:
    """The pairs that have text on both sides; the first that has not is named, or all are counted."""
    kept = [pair for pair in pairs if pair[0].strip() and pair[1].strip()]
    if len(kept) == len(pairs):
        return kept
    if empty == "refuse":
        number = next(index for index, pair in enumerate(pairs) if not (pair[0].strip() and pair[1].strip()))
        name = names[0] if not pairs[number][0].strip() else names[1]
        raise DataError(
            f"{name}, line {number + 1} is empty ({len(pairs) - len(kept)} of {len(pairs)} pairs have an empty side); "
            'fill it in, remove the line from both sides, or read with empty="drop"'
        )
    if not kept:
        raise DataError(f"{names[0]} and {names[1]}: none of {len(pairs)} pairs has text on both sides")
    logger.warning("%s, %s: dropped %d of %d pairs, empty on a side", *names, len(pairs) - len(kept), len(pairs))
    return kept


def _short_enough(lengths: np.ndarray, max_length: int | None, too_long: Action) -> Int64[np.ndarray, " kept"]:
    """Places of the pairs within `max_length`."""
    longest = lengths.max(axis=1, initial=0)
    if max_length is None:
        kept = np.arange(len(lengths), dtype=np.int64)
    else:
        kept = np.flatnonzero(longest <= max_length).astype(np.int64)
    dropped = len(lengths) - len(kept)
    if dropped and too_long == "refuse":
        first = int(np.argmax(longest > max_length))
        raise DataError(
            f"pair {first} has {lengths[first, 0]} source and {lengths[first, 1]} target tokens, end token included; "
            f"{dropped} of {len(lengths)} pairs exceed max_length {max_length}: raise max_length or drop them"
        )
    if not len(kept):
        raise DataError(
            f"no pair remains of {len(lengths)} within max_length {max_length}; "
            f"the shortest has {longest.min() if len(longest) else 0} tokens: raise max_length or give more pairs"
        )
    if dropped:
        logger.warning("dropped %d of %d pairs longer than %s tokens", dropped, len(lengths), max_length)
    return kept
