"""Documents from a text file, a file of JSON lines, or a folder of text files."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from tameformer.data.text import read_lines, read_text
from tameformer.errors import DataError

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".txt", ".txt.gz")
_JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")


def read_documents(path: str | Path, field: str = "text", *, blank_lines_separate: bool = False) -> list[str]:
    """The documents under a path, in the order of the file, or of the file names.

    - `.jsonl` or `.jsonl.gz`: one JSON object a line, the document in its `field`
    - a folder: every `.txt` and `.txt.gz` below it, sorted by path
    - any other file: text, one document

    Documents of white space only are left out and counted in the log.

    Args:
        path: A file or a folder.
        field: Name of the text field of a JSON object; not used for plain text.
        blank_lines_separate: Cut plain text into documents at every run of blank lines.

    Raises:
        DataError: Missing or unreadable files, broken JSON, a missing field (the line is named), no document at all.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.name.endswith(_TEXT_SUFFIXES) and file.is_file())
        if not files:
            raise DataError(f"{path} has no .txt or .txt.gz file below it; name a folder of text files, or one file")
        found = [document for file in files for document in _text_documents(file, blank_lines_separate)]
    elif path.name.endswith(_JSON_LINES_SUFFIXES):
        found = _json_documents(path, field)
    elif path.name.endswith((".json", ".json.gz")):
        raise DataError(f"{path}: expected one JSON object a line, in a file that ends in .jsonl or .jsonl.gz")
    else:
        found = _text_documents(path, blank_lines_separate)
    documents = [document for document in found if document and not document.isspace()]
    if not documents:
        raise DataError(f"{path} has {len(found)} documents, none with any text; expected at least one")
    if len(documents) < len(found):
        logger.warning(
            "%s: left out %d of %d documents, which are empty", path, len(found) - len(documents), len(found)
        )
    return documents


def _text_documents(path: Path, blank_lines_separate: bool) -> list[str]:
    """The documents of one plain text file."""
    text = read_text(path)
    return re.split(r"(?:\r?\n[ \t]*){2,}", text.strip()) if blank_lines_separate else [text]


def _json_documents(path: Path, field: str) -> list[str]:
    """The field of every line; empty lines are no lines."""
    lines = enumerate(read_lines(path), start=1)
    return [_json_document(path, number, line, field) for number, line in lines if line.strip()]


def _json_document(path: Path, number: int, line: str, field: str) -> str:
    """The field of one line, or a refusal that names the line."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON: {error}; expected one object a line") from error
    if not isinstance(row, dict):
        raise DataError(f'{path}, line {number}: expected an object such as {{"{field}": "..."}}, got {line[:40]!r}')
    if field not in row:
        raise DataError(f"{path}, line {number}: no field {field!r}; the fields are {sorted(row)}, name one of them")
    text = row[field]
    if not isinstance(text, str):
        raise DataError(f"{path}, line {number}: field {field!r} must be text, got {text!r:.40}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}, line {number}: field {field!r} holds half a surrogate pair (\\u{ord(text[error.start]):04x}) "
            f"at character {error.start}, which is no Unicode text; remove it"
        ) from error
    return text
