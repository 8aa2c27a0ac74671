"""Text to token ids and back: one id a character, or byte-level byte-pair encoding.

Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909; over bytes as in Radford et al. 2019, GPT-2) is trained and
applied by the `tokenizers` library (extra `text`). No text is ever out of vocabulary, and decoding gives back every
text exactly, also one that contains the name of a special token: these are never read from text, callers add their ids.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from tameformer.data.text import read_text
from tameformer.errors import DataError, missing_extra
from tameformer.record import write_atomically
from tameformer.shapes import Int64, Integer

logger = logging.getLogger(__name__)

Ids = Sequence[int] | Integer[np.ndarray, " tokens"] | Integer[Tensor, " tokens"]

SPECIAL_TOKENS = ("<pad>", "<begin>", "<end>")
_NUM_BYTES = 256
_KEY, _TOKENIZER = "training_sha256", "tokenizer"  # the two fields of a file that `cached_bpe` writes


class Tokenizer(Protocol):
    """What sources and recipes need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""
        ...

    def encode(self, text: str) -> Int64[np.ndarray, " tokens"]:
        """The ids of a text, no special tokens added."""
        ...

    def decode(self, ids: Ids) -> str:
        """The text of ids; special tokens give no text."""
        ...


class CharTokenizer:
    """One id for each character of a fixed set, in the order of their code points; no special tokens.

    Example:
        >>> tokenizer = CharTokenizer.from_text("banana")
        >>> tokenizer.vocab_size, tokenizer.encode("nab").tolist(), tokenizer.decode([2, 0, 1])
        (3, [2, 0, 1], 'nab')
    """

    def __init__(self, characters: Iterable[str]):
        self.characters: tuple[str, ...] = tuple(sorted(set(characters)))
        if not self.characters or any(len(character) != 1 for character in self.characters):
            wrong = [character for character in self.characters if len(character) != 1]
            raise ValueError(f"expected one or more single characters, got {wrong or 'none'}")
        self._codes = np.array([ord(character) for character in self.characters], dtype=np.uint32)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer of the characters that occur in a text."""
        return cls(set(text))

    @property
    def vocab_size(self) -> int:
        """Number of characters known."""
        return len(self.characters)

    def encode(self, text: str) -> Int64[np.ndarray, " tokens"]:
        """One id a character.

        Raises:
            DataError: A character is not in the vocabulary; the message names it and its place.
        """
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.minimum(np.searchsorted(self._codes, codes), self.vocab_size - 1)
        wrong = self._codes[ids] != codes
        if wrong.any():
            place = int(wrong.argmax())
            raise DataError(
                f"character {text[place]!r} (U+{ord(text[place]):04X}) at position {place} is not among the "
                f"{self.vocab_size} characters of the vocabulary; build the vocabulary from all splits, or remove it"
            )
        return ids.astype(np.int64)

    def decode(self, ids: Ids) -> str:
        """The text of the ids.

        Raises:
            ValueError: An id is outside [0, vocab_size).
        """
        numbers = np.asarray(ids, dtype=np.int64)
        wrong = (numbers < 0) | (numbers >= self.vocab_size)
        if wrong.any():
            raise ValueError(f"expected ids in [0, {self.vocab_size}), got {numbers[wrong.argmax()]}")
        return self._codes[numbers].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def to_json(self) -> str:
        """The vocabulary as JSON, ASCII only."""
        return json.dumps({"type": "characters", "characters": "".join(self.characters)})

    @classmethod
    def from_json(cls, text: str) -> "CharTokenizer":
        """The inverse of `to_json`.

        Raises:
            DataError: Not a vocabulary written by `to_json`.
        """
        try:
            content = json.loads(text)
            if content["type"] != "characters":
                raise KeyError("type")
            return cls(content["characters"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"not a character vocabulary: {error!r}; write one with CharTokenizer.save") from error

    def save(self, path: str | Path) -> None:
        """Write the vocabulary to one JSON file."""
        write_atomically(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "CharTokenizer":
        """Read what `save` wrote."""
        return cls.from_json(read_text(path))


class BPETokenizer:
    """Byte-level byte-pair encoding; ids 0, 1, 2 are padding, begin and end. Made by `train_bpe` or `load`.

    The file that `save` writes is an ordinary `tokenizer.json`, which `tokenizers` and transformers read too.
    """

    def __init__(self, library_tokenizer: Any):
        self._tokenizer = library_tokenizer
        self._tokenizer.encode_special_tokens = True  # "<end>" inside a text is text; not kept in the file, so set here
        special = {number for number, token in library_tokenizer.get_added_tokens_decoder().items() if token.special}
        if not {0, 1, 2} <= special:
            raise DataError(f"expected ids 0, 1, 2 to be padding, begin and end, got special ids {sorted(special)}")
        self.padding_id, self.begin_id, self.end_id = 0, 1, 2

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def special_id(self, name: str) -> int:
        """The id of a special token, such as "<mask>".

        Raises:
            DataError: The tokenizer has no such token.
        """
        found = self._tokenizer.token_to_id(name)
        if found is None:
            raise DataError(f"the tokenizer has no token {name}; train one with special_tokens that hold it")
        return found

    def encode(self, text: str) -> Int64[np.ndarray, " tokens"]:
        """The ids of a text, no special tokens added; an empty text has none."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int64[np.ndarray, " tokens"]]:
        """The ids of each text, over all cores; equal to `encode` one by one."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, ids: Ids) -> str:
        """The text of the ids; special tokens give nothing, bytes that are not UTF-8 give U+FFFD."""
        return self._tokenizer.decode(_as_list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The tokenizer as the text of a `tokenizer.json`."""
        return self._tokenizer.to_str()

    @classmethod
    def from_json(cls, text: str) -> "BPETokenizer":
        """The inverse of `to_json`.

        Raises:
            DataError: Not a `tokenizer.json` whose ids 0, 1, 2 are special tokens.
            ImportError: The package `tokenizers` is not installed.
        """
        library = _import_library()
        try:
            tokenizer = library.Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"not a tokenizer file: {error}; write one with BPETokenizer.save") from error
        return cls(tokenizer)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to one JSON file."""
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "BPETokenizer":
        """Read what `save` or `cached_bpe` wrote, or any `tokenizer.json` whose ids 0, 1, 2 are padding, begin, end.

        Raises:
            DataError: The file is missing or is no such tokenizer.
        """
        return _read_tokenizer(Path(path))[0]


def train_bpe(
    texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str] = SPECIAL_TOKENS, min_frequency: int = 2
) -> BPETokenizer:
    """A byte-level BPE tokenizer learnt from texts; the same texts always give the same tokenizer.

    For translation pass the texts of both languages: one joint vocabulary lets the embeddings be tied.

    Args:
        texts: What to learn merges from, all of it.
        vocab_size: Number of ids wanted, with the 256 bytes and the special tokens; fewer when the text offers no
            more pairs that occur `min_frequency` times (said in the log).
        special_tokens: Names of padding, begin and end, in this order, and further ones; like `<word>` or `<|word|>`,
            which no merge can spell because words and punctuation are split before merging.
        min_frequency: How often a pair must occur to be merged.

    Raises:
        ValueError: `vocab_size` too small, or special tokens that could also be text.
        DataError: No text.
        ImportError: The package `tokenizers` is not installed.
    """
    library = _import_library()
    smallest = _NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size must be at least {smallest} (256 bytes and {len(special_tokens)} special tokens), "
            f"got {vocab_size}"
        )
    _check_special_tokens(special_tokens)
    if not any(texts):
        raise DataError(f"a tokenizer needs text to learn from, got {len(texts)} texts, none with a character")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    trained = BPETokenizer(tokenizer)
    if trained.vocab_size < vocab_size:
        logger.warning("the text gave %d tokens of the %d asked for", trained.vocab_size, vocab_size)
    return trained


def cached_bpe(
    texts: Sequence[str],
    vocab_size: int,
    cache_path: str | Path,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    min_frequency: int = 2,
) -> BPETokenizer:
    """`train_bpe`, kept in one JSON file: trained and written the first time, read from then on.

    The file carries a hash of everything that went into it, so that a resumed run gets the tokenizer it began with or
    a refusal, never another one. `BPETokenizer.load` reads it too.

    Raises:
        DataError: The file was trained from other texts or settings, or is no tokenizer.
    """
    cache_path = Path(cache_path)
    key = _training_key(texts, vocab_size, special_tokens, min_frequency)
    if not cache_path.exists():
        tokenizer = train_bpe(texts, vocab_size, special_tokens, min_frequency)
        cache_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache_path, json.dumps({_KEY: key, _TOKENIZER: json.loads(tokenizer.to_json())}))
        return tokenizer
    tokenizer, found = _read_tokenizer(cache_path)
    if found != key:
        raise DataError(
            f"{cache_path} holds a tokenizer trained from other texts or settings ({_KEY} {found}, expected {key}); "
            "use another run folder, or restore the texts, vocab_size and special tokens it was trained with"
        )
    logger.info("tokenizer of %d tokens read from %s", tokenizer.vocab_size, cache_path)
    return tokenizer


def _as_list(ids: Ids) -> list[int]:
    """Ids as the library takes them."""
    return ids.tolist() if isinstance(ids, np.ndarray | Tensor) else list(ids)


def _read_tokenizer(path: Path) -> tuple[BPETokenizer, str | None]:
    """The tokenizer in a file and the hash of what it was trained from, None when the file does not say."""
    try:
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise DataError(f"expected a JSON object, got {type(content).__name__}")
        if _KEY not in content:
            return BPETokenizer.from_json(json.dumps(content)), None
        return BPETokenizer.from_json(json.dumps(content.get(_TOKENIZER))), content[_KEY]
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not a tokenizer file, which is JSON: {error}") from error
    except DataError as error:
        message = str(error)
        raise DataError(message if str(path) in message else f"{path}: {message}") from error


def _training_key(texts: Sequence[str], vocab_size: int, special_tokens: Sequence[str], min_frequency: int) -> str:
    """SHA-256 of the settings and of every text with its length, so that moving a boundary changes the key."""
    digest = hashlib.sha256(json.dumps([vocab_size, list(special_tokens), min_frequency]).encode())
    for text in texts:
        raw = text.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


def _check_special_tokens(special_tokens: Sequence[str]) -> None:
    """Refuse special tokens that are too few, repeated, or that merges could spell."""
    if len(special_tokens) < 3 or len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens must be distinct names of padding, begin, end, ..., got {special_tokens}")
    for token in special_tokens:
        if not re.fullmatch(r"<\|?\w+\|?>", token):
            raise ValueError(f"a special token must look like <word> or <|word|>, got {token!r}")


def _import_library() -> Any:
    """The `tokenizers` package, imported only where it is used."""
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise missing_extra("tokenizers", "text") from error
    return tokenizers
