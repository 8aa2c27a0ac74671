"""BLEU by sacreBLEU, with the signature that each score is reported with (Post 2018, arXiv:1804.08771).

A score without its tokenization and case means little, and published Multi30k figures are of another kind than
sacreBLEU's default: lower-cased text, tokenized by the Moses scripts. `moses_words` follows the rules of these scripts
(`lowercase`, `normalize-punctuation` and `tokenizer`; Koehn et al. 2007, "Moses: Open Source Toolkit for Statistical
Machine Translation") as far as they matter for text in lower case.

Differs from Moses: no lists of abbreviations (almost all have capitals, which lower case has removed), special
characters are not written as XML entities, and languages other than English have the rules of German.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest

from tameformer.errors import missing_extra

METRICS = {
    "bleu": {},
    "bleu_lowercased": {"lowercase": True},
    "bleu_tokenized": {"lowercase": True, "tokenize": "none", "force": True},  # it warns of words without `force`
}
"""Settings of sacreBLEU by the name of the metric; `bleu_tokenized` is over `moses_words` of both sides."""

_PLAIN = str.maketrans(
    {"\u201e": '"', "\u201c": '"', "\u201d": '"', "\u00ab": '"', "\u00bb": '"', "\u2018": "'", "\u201a": "'"}
    | {"\u2019": '"', "\u00b4": "'", "`": "'", "\u2013": "-", "\u2014": " - ", "\u2026": "..."}
)
_LETTER = r"[^\W\d_]"
_APOSTROPHE = re.compile("(?<=[a-z])[\u2018\u2019](?=[a-z])")


def bleu_scores(translations: Sequence[str], references: Sequence[str], *, language: str) -> dict[str, float]:
    """BLEU in percent by metric: cased, lower-cased, and over lower-cased words as published Multi30k figures are.

    Args:
        translations: One a sentence, detokenized.
        references: One a sentence, detokenized.
        language: Of the translations; English has its own rules for apostrophes.

    Raises:
        ImportError: sacreBLEU is not installed; the message names the extra.

    Example:
        >>> scores = bleu_scores(["Ein Mann läuft."], ["ein Mann läuft."], language="de")
        >>> {name: round(score, 6) for name, score in scores.items() if name != "bleu"}
        {'bleu_lowercased': 100.0, 'bleu_tokenized': 100.0}
    """
    scores = {}
    for name in METRICS:
        sides = [list(translations), list(references)]
        if name == "bleu_tokenized":
            sides = [[" ".join(moses_words(text, language)) for text in side] for side in sides]
        scores[name] = _metric(name).corpus_score(sides[0], [sides[1]]).score
    return scores


def bleu_signatures(language: str) -> dict[str, str]:
    """Signature by sacreBLEU of each metric for one reference, and under `words` what `bleu_tokenized` counts.

    Example:
        >>> bleu_signatures("de")["bleu"].partition("|version:")[0]
        'nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp'
    """
    signatures = {name: str(_metric(name, references=[[""]]).get_signature()) for name in METRICS}
    return signatures | {"words": f"bleu_tokenized: lower case, Moses rules, language {language}"}


def moses_words(text: str, language: str) -> list[str]:
    """The lower-cased words and punctuation marks of a sentence, by the rules of the Moses scripts.

    Every character but letters, digits, hyphens, full stops, commas and apostrophes stands alone; commas do, except
    between digits; a run of full stops is one word; a full stop ends the sentence, or a word that no small letter
    follows. An apostrophe stands alone, but in English it begins what follows: `don 't`.

    Example:
        >>> moses_words("Der Mann (3,5 m groß) ruft: \u201eOma's E-Gitarre\u201c!", "de")[9:]
        ['"', 'oma', "'", 's', 'e-gitarre', '"', '!']
    """
    text = _APOSTROPHE.sub("'", text.lower()).translate(_PLAIN).replace("''", '"')
    text = re.sub(r'"([,.]+)', r'\1"', text) if language == "en" else re.sub(r'(\.+|,)"', r'"\1', text)
    text = re.sub(r"[^\w\s.',-]|_", r" \g<0> ", text)
    text = re.sub(r"\.{2,}", r" \g<0> ", text)
    text = re.sub(r"(?<!\d),|,(?!\d)", " , ", text)
    if language == "en":
        text = re.sub(
            rf"(?<={_LETTER})'(?={_LETTER})|(?<=\d)'(?=s)|(')", lambda found: " ' " if found[1] else " '", text
        )
    else:
        text = text.replace("'", " ' ")
    words = text.split()
    return [part for word, following in zip_longest(words, words[1:]) for part in _without_full_stop(word, following)]


def _without_full_stop(word: str, following: str | None) -> list[str]:
    """The word, or the word and its full stop where that is none of an abbreviation."""
    stem = word[:-1]
    if not word.endswith(".") or stem.strip(".") == "":
        return [word]
    is_abbreviation = "." in stem and any(character.isalpha() for character in stem)
    if following is not None and (is_abbreviation or following[0].islower()):
        return [word]
    return [stem, "."]


def _metric(name: str, **settings):
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise missing_extra("sacrebleu", "text") from error
    return BLEU(**METRICS[name], **settings)
