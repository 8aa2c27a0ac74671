"""Text files, read strictly: UTF-8 or a refusal that says where, and one meaning of "line"."""

import gzip
import zlib
from pathlib import Path

from tameformer.errors import DataError


def read_text(path: str | Path) -> str:
    """The whole text of a file, plain or compressed (name ends in `.gz`); line ends are kept as they are.

    A byte-order mark at the very start is not text and is left out.

    Raises:
        DataError: The file is missing, empty, a folder, unreadable, or not UTF-8 (the first bad byte is named).
    """
    path = Path(path)
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start} ({error.reason}); "
            f"{_remedy(raw)}"
        ) from error
    text = text.removeprefix("\ufeff")
    if not text:
        raise DataError(f"{path} is empty; expected UTF-8 text")
    return text


def read_lines(path: str | Path) -> list[str]:
    r"""The lines of a text file, without their ends: a line ends at "\n" or "\r\n" and nowhere else.

    Other separators of Unicode (U+2028, U+0085, a form feed, a lone "\r") stay inside their line, so that line i of
    two parallel files is line i in every other tool. A last line needs no "\n".

    Raises:
        DataError: As `read_text`.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def num_bytes(text: str) -> int:
    """The length of a text in UTF-8 bytes: the tokenizer-free unit for perplexity.

    Example:
        >>> num_bytes("a"), num_bytes("\u00e4"), num_bytes("\u20ac")
        (1, 2, 3)
    """
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _read_bytes(path: Path) -> bytes:
    """The file's bytes, decompressed; every failure of the file system named with path and remedy."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a text file, name the file inside it")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path (the working folder is {Path.cwd()})") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check its permissions") from error
    if path.suffix != ".gz" or not raw:
        return raw
    try:
        return gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip file: {error}; fetch it again, or rename it without .gz"
        ) from error


def _remedy(raw: bytes) -> str:
    """The remedy for bytes that are not UTF-8, by what they begin with."""
    if raw.startswith(b"\x1f\x8b"):
        return "it looks gzip-compressed: give it a name that ends in .gz"
    encoding = "UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "WINDOWS-1252"
    return f"convert it, for example: iconv -f {encoding} -t UTF-8 IN > OUT"
