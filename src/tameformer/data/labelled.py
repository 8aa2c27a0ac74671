"""Texts, or pairs of them, with classes: read from a file with named columns, and padded to the longest of a batch."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tameformer.data.augment.tokens import TokenTransform, augment_tokens
from tameformer.data.keys import SampleKeys
from tameformer.data.text import read_lines, read_text
from tameformer.errors import DataError
from tameformer.shapes import Int64

TEXTS, PAIRS = ("text", "sentence"), (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"))
"""Names of columns that are looked for, in order."""


@dataclass(frozen=True)
class LabelledText:
    """One row."""

    text: str
    pair: str | None
    """The second text of a pair."""
    label: int
    """Number of its class, from 0."""
    where: str = field(default="", compare=False)
    """File and line, or row, for messages."""


def classes_of(rows: Sequence[LabelledText]) -> int:
    """How many classes there are, where nobody says so: one more than the largest label.

    Raises:
        DataError: A class below the largest has no text, as when counting began with 1 or a label has a digit too many; or all
            texts have class 0. A row is named.

    Example:
        >>> classes_of([LabelledText("a", None, 0), LabelledText("b", None, 1)])
        2
    """
    largest, known = max(rows, key=lambda row: row.label), {row.label for row in rows}
    absent = next((label for label in range(largest.label) if label not in known), None)
    if absent is not None:
        raise DataError(
            f"{largest.where}: the label {largest.label} is a class, but no row has class {absent}; correct the row, number "
            "the classes from 0 without gaps, or say with data.num_classes how many there are"
        )
    if largest.label == 0:
        raise DataError(
            f"{largest.where}, and all other rows, have class 0, so that there is nothing to tell apart; look at the column, "
            "or say with data.num_classes how many classes there are"
        )
    return largest.label + 1


def read_labelled(
    path: str | Path, *, label_column: str = "label", num_classes: int | None = None
) -> list[LabelledText]:
    """The rows of a .jsonl, .csv or .tsv file, which may end in .gz.

    The text is in a column `text` or `sentence`, a pair in `sentence1` and `sentence2`, and the class, a whole number from 0,
    in `label_column`. The first line of a .csv or .tsv file names the columns; a .tsv has no quotes.

    Args:
        path: The file.
        label_column: Name of the column of classes.
        num_classes: How many there are; None takes any number.

    Raises:
        DataError: No such file or columns; a text or a label that is missing, or a label that is no class. The row is named.
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise DataError(f"{path} has no rows; expected texts with labels")
    columns = list(rows[0][1])
    pair = next((names for names in PAIRS if set(names) <= set(columns)), None)
    single = next((name for name in TEXTS if name in columns), None)
    names = pair or ((single,) if single else None)
    if names is None:
        raise DataError(
            f"{path} has the columns {', '.join(columns)}, none of which is text or sentence, and no sentence1 and sentence2; "
            "rename the one that is meant"
        )
    return [_row(f"{path}, {where}", row, names, label_column, num_classes) for where, row in rows]


def _rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Each row with the words that name it."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".jsonl"):
        lines = [(f"line {number}", line) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
        return [(where, _json_row(path, where, line)) for where, line in lines]
    if name.endswith(".csv"):
        return [
            (f"row {n}", row) for n, row in enumerate(csv.DictReader(io.StringIO(read_text(path), newline="")), start=1)
        ]
    if name.endswith(".tsv"):
        head, *rest = [line.split("\t") for line in read_lines(path)]
        for number, cells in enumerate(rest, start=2):
            if len(cells) != len(head):
                raise DataError(f"{path}, line {number}: expected {len(head)} columns as in line 1, got {len(cells)}")
        return [(f"line {number}", dict(zip(head, cells, strict=True))) for number, cells in enumerate(rest, start=2)]
    raise DataError(f"{path}: expected a name that ends in .jsonl, .csv or .tsv, or that and .gz")


def _json_row(path: Path, where: str, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, {where}: not JSON: {error}; expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, {where}: expected an object with columns, got {line[:40]!r}")
    return row


def _row(
    where: str, row: Mapping[Any, Any], names: Sequence[str], label_column: str, num_classes: int | None
) -> LabelledText:
    texts = []
    if None in row:
        raise DataError(
            f"{where}: more cells than columns, the last is {row[None][-1]!r}; quote texts that hold a comma"
        )
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise DataError(f"{where}: {name} must be text, got {row.get(name)!r}; fill it in, or leave the row out")
        texts.append(row[name])
    given = row.get(label_column)
    if given is None or given == "":
        there = ", ".join(name for name in row if name is not None)
        raise DataError(f"{where}: no {label_column}; the columns are {there}, and every row needs a class")
    try:
        label = int(given) if isinstance(given, str) else given
    except ValueError:
        label = given
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(
            f"{where}: {label_column} must be the number of a class, got {given!r}; number them 0, 1, ... without a point, or "
            "name the column that does with data.label_column"
        )
    if label < 0 or (num_classes is not None and label >= num_classes):
        most = "" if num_classes is None else f" below {num_classes}"
        remedy = (
            "-1 often stands for unknown: leave such rows out" if label < 0 else "correct it, or raise data.num_classes"
        )
        raise DataError(f"{where}: {label_column} must be a class from 0{most}, got {label}; {remedy}")
    return LabelledText(texts[0], texts[1] if len(texts) > 1 else None, label, where)


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts with classes, as batches padded to their longest."""

    tokens: Sequence[Int64[np.ndarray, " _"]]
    """Ids of each text, special tokens included."""
    labels: Int64[np.ndarray, " texts"]
    """Its class."""
    padding_id: int
    """Fills up."""
    segments: Sequence[Int64[np.ndarray, " _"]] | None = None
    """Which text of a pair a token belongs to, for models that are told."""
    transforms: Sequence[TokenTransform] = ()
    """Noise on the tokens, each sample with its own random numbers; those that leave tokens out do not move `segments`."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Int64[np.ndarray, " texts"]:
        """Tokens of each text."""
        return np.array([len(one) for one in self.tokens], dtype=np.int64)

    def fetch(self, keys: SampleKeys) -> dict[str, Tensor | int]:
        """`tokens` and `real` (batch, seq), `segments` where there are, `labels` (batch), and `num_items`."""
        rows = [self.tokens[index] for index in keys.indices]
        tokens, lengths = _padded(rows, self.padding_id), torch.tensor([len(row) for row in rows])
        if self.transforms:
            tokens, lengths = augment_tokens(tokens, lengths, keys, self.transforms, padding_id=self.padding_id)
        batch: dict[str, Tensor | int] = {
            "tokens": tokens,
            "real": torch.arange(tokens.shape[1]) < lengths[:, None],
            "labels": torch.from_numpy(self.labels[keys.indices]),
            "num_items": len(keys),
        }
        if self.segments is not None:
            batch["segments"] = _padded([self.segments[index] for index in keys.indices], 0)
        return batch


def _padded(rows: Sequence[np.ndarray], filler: int) -> Tensor:
    filled = np.full((len(rows), max(map(len, rows))), filler, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        filled[place, : len(row)] = row
    return torch.from_numpy(filled)


def joined(
    first: Int64[np.ndarray, " first"],
    second: Int64[np.ndarray, " second"] | None,
    *,
    begin_id: int,
    end_id: int,
    max_length: int,
) -> Int64[np.ndarray, " tokens"]:
    """Begin + text + end, or begin + text + end + text + end; what is too long loses the end of its longer text.

    Example:
        >>> joined(np.array([7, 8, 9, 9]), np.array([5]), begin_id=1, end_id=2, max_length=7).tolist()
        [1, 7, 8, 9, 2, 5, 2]
    """
    parts = [first] if second is None else [first, second]
    while sum(map(len, parts)) + len(parts) + 1 > max_length:
        longest = max(range(len(parts)), key=lambda place: len(parts[place]))
        parts[longest] = parts[longest][:-1]
    end = np.array([end_id])
    return np.concatenate([np.array([begin_id]), *(piece for part in parts for piece in (part, end))]).astype(np.int64)
