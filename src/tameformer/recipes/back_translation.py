"""Paraphrases of training texts, by translating them there and back: more texts to learn from, of the same classes.

Sennrich et al. 2016, arXiv:1511.06709, translated back to learn to translate; Yu et al. 2018, "QANet", arXiv:1804.09541, to
paraphrase the texts of another task; Xie et al. 2020, "Unsupervised Data Augmentation", arXiv:1904.12848, drew the words
rather than searched for the best ones, for more variety. It is done once, before training, and looked at: a translator that
is not good enough changes what a text says, and so its class.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tameformer.data.labelled import LabelledText, read_labelled
from tameformer.data.sentences import sentences
from tameformer.data.tokenizers import BPETokenizer
from tameformer.errors import CheckpointError, DataError
from tameformer.models import EncoderDecoder
from tameformer.models.generate import Steps, sample
from tameformer.models.recurrent_translation import RecurrentTranslation
from tameformer.recipes.export import plain_model
from tameformer.recipes.translation import PREPROCESSING, TOKENIZER, DecodingConfig, Search, translate
from tameformer.record import write_atomically
from tameformer.training import Engine

logger = logging.getLogger(__name__)

Translator = Callable[[Sequence[str]], Sequence[str]]
"""From sentences to as many sentences: a run of ours by `translator`, or any other model or service."""


def translator(
    path: str | Path, *, num_beams: int = 4, temperature: float | None = None, seed: int = 0, max_tokens: int = 8192
) -> Translator:
    """What a run of `translation` or `seq2seq-rnn` has learned, as a function from sentences to their translations.

    A sentence with more tokens than the model can hold stays as it is; their number is logged.

    Args:
        path: The run folder, one of its checkpoints, or the folder that `export` wrote of it.
        num_beams: Sentences kept at each step of the search.
        temperature: Draw each token from softmax(logits / temperature) instead of searching; the same draws for the same
            sentences and `seed`.
        seed: Of the draws.
        max_tokens: Padded tokens translated at a time.

    Raises:
        CheckpointError: No sound model there, or not one that translates.
        ConfigError: The run folder's configuration is not one of ours.

    Example:
        See `back_translate`.
    """
    path = Path(path)
    model, architecture, _ = plain_model(path)
    folder = path.parent.parent if path.parent.name == "checkpoints" else path
    if not isinstance(model, EncoderDecoder | RecurrentTranslation) or not (folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"{path} holds a model ({architecture.builder}) that translates no text; give a run of translation or seq2seq-rnn"
        )
    tokenizer = BPETokenizer.load(folder / TOKENIZER)
    lowercase = _is_lowercase(folder / PREPROCESSING)
    decoding = DecodingConfig(num_beams=num_beams)
    engine = Engine()
    model.to(engine.device).eval()

    def translated(texts: Sequence[str]) -> list[str]:
        told = [text.lower() for text in texts] if lowercase else list(texts)
        fits = [len(tokens) < model.max_length for tokens in tokenizer.encode_batch(told)]
        if not all(fits):
            logger.warning(
                "%d of %d sentences have more than %d tokens and stay as they are",
                fits.count(False), len(fits), model.max_length - 1,
            )  # fmt: skip
        chosen = [text for text, fit in zip(told, fits, strict=True) if fit]
        search: Search | None = None
        if temperature is not None:
            generator = torch.Generator(engine.device).manual_seed(seed)
            search = partial(_drawn, temperature=temperature, generator=generator)
        found = iter(translate(engine, model, chosen, tokenizer, decoding, max_tokens, search) if chosen else [])
        return [next(found) if fit else text for text, fit in zip(texts, fits, strict=True)]

    return translated


def back_translate(texts: Sequence[str], there: Translator, back: Translator) -> list[str]:
    """Each text in the words that it has after both translations, sentence by sentence.

    Args:
        texts: To paraphrase; one of several sentences is cut into them, for translators have learned from sentences.
        there: Into another language.
        back: Out of it.

    Raises:
        DataError: A translator returns another number of sentences than it was given.

    Example:
        >>> german = {"Good.": "Gut.", "A fine film.": "Ein guter Film."}
        >>> english = {"Gut.": "Good.", "Ein guter Film.": "A good film."}
        >>> there, back = (lambda lines, words=words: [words[line] for line in lines] for words in (german, english))
        >>> back_translate(["Good. A fine film."], there, back)
        ['Good. A good film.']
    """
    parts = [sentences(text) for text in texts]
    flat = [sentence for part in parts for sentence in part]
    abroad = _as_many(there, flat, "there")
    home = iter(_as_many(back, abroad, "back"))
    return [" ".join(next(home) for _ in part) for part in parts]


@dataclass(frozen=True)
class Paraphrased:
    """What was written."""

    path: Path
    """Where."""
    texts: int
    """Rows that were there before."""
    paraphrases: int
    """Rows added."""


def paraphrase(
    path: str | Path, out: str | Path, there: Translator, back: Translator, *, label_column: str = "label"
) -> Paraphrased:
    """Write a file of labelled texts anew, with the paraphrase of each behind it, of the same class.

    What comes back as it was, or empty, is not written again. Rows have the columns `text`, or `sentence1` and `sentence2`, and
    `label`; a paraphrase has `paraphrase_of` besides, the number of its text, from 1. Evaluate on a file of its own.

    Args:
        path: Training texts, as `text-classification` reads them.
        out: A .jsonl that does not exist.
        there: Into another language.
        back: Out of it.
        label_column: Name of the column of classes.

    Raises:
        DataError: The file cannot be read, or a translator does not return as many sentences as it was given.
        FileExistsError: `out` exists.
        ValueError: `out` does not end in .jsonl.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise ValueError(f"expected a name that ends in .jsonl, got {out}")
    if out.exists():
        raise FileExistsError(f"{out} exists; give another name, or remove it")
    rows = read_labelled(path, label_column=label_column)
    pairs = [row.text if row.pair is None else (row.text, row.pair) for row in rows]
    flat = [text for one in pairs for text in ([one] if isinstance(one, str) else one)]
    again = iter(back_translate(flat, there, back))
    lines, added = [], 0
    for number, row in enumerate(rows, start=1):
        other = LabelledText(next(again), None if row.pair is None else next(again), row.label)
        lines.append(_line(row))
        if other != row and other.text.strip() and (other.pair is None or other.pair.strip()):
            lines.append(_line(other, paraphrase_of=number))
            added += 1
    write_atomically(out, "".join(lines))
    return Paraphrased(out, len(rows), added)


def _line(row: LabelledText, **more: int) -> str:
    texts = {"text": row.text} if row.pair is None else {"sentence1": row.text, "sentence2": row.pair}
    return json.dumps({**texts, "label": row.label, **more}, ensure_ascii=False) + "\n"


def _as_many(translator: Translator, lines: Sequence[str], name: str) -> list[str]:
    found = list(translator(lines))
    if len(found) != len(lines):
        raise DataError(
            f"the translator {name} was given {len(lines)} sentences and returned {len(found)}; expected one for each"
        )
    return found


def _drawn(steps: Steps, max_new_tokens: int, end_id: int, *, temperature: float, generator: torch.Generator) -> Tensor:
    return sample(steps, max_new_tokens=max_new_tokens, generator=generator, temperature=temperature, end_id=end_id)


def _is_lowercase(path: Path) -> bool:
    """Whether the translator has learned from text in lower case only; folders of before this was kept do not say."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return isinstance(values, dict) and values.get("lowercase") is True
