"""BLEU against scores counted by hand, and the words it counts against those of the Moses scripts."""

import math
from collections import Counter

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from tameformer.recipes.bleu import bleu_scores, bleu_signatures, moses_words

# What lowercase.perl | normalize-punctuation.perl -l LANGUAGE | tokenizer.perl -l LANGUAGE -no-escape print.
WORDS = [
    ("de", "Ein Hund, 3,5 kg schwer, bellt.", "ein hund , 3,5 kg schwer , bellt ."),
    ("de", "Auf dem Schild steht: „Halt.“", 'auf dem schild steht : " halt " .'),
    ("de", "„Nein,“ sagt Oma's Freund", '" nein " , sagt oma \' s freund'),
    ("de", "Ein T-Shirt \u2013 schwarz/weiß (neu)!", "ein t-shirt - schwarz / weiß ( neu ) !"),
    ("de", "Er kommt ca. um 3 Uhr aus N.Y. an.. ", "er kommt ca. um 3 uhr aus n.y. an .."),
    ("de", "Nummer 7. 12 Leute warten…", "nummer 7 . 12 leute warten ..."),
    ("de", "50% in snake_case", "50 % in snake _ case"),
    ("en", "They don't mind the 1990's.", "they don 't mind the 1990 's ."),
    ("en", "The dogs' “owner”, he says.", 'the dogs \' " owner , " he says .'),
    ("en", "She isn\u2019t 'here' now", "she isn 't ' here ' now"),
    ("de", "", ""),
]


@pytest.mark.parametrize(("language", "text", "words"), WORDS)
def test_words_are_those_of_moses(language, text, words):
    assert " ".join(moses_words(text, language)) == words


@given(st.text(alphabet="aÄß1 .,'\"\u2019„()-_", max_size=30), st.sampled_from(["de", "en"]))
def test_words_lose_nothing_but_case_and_spaces(text, language):
    words = moses_words(text, language)
    assert all(word and not any(character.isspace() for character in word) for word in words)
    plain = text.lower().translate(str.maketrans({"\u2019": "'", "„": '"'})).replace('"', "''")
    letters = Counter("".join(words).replace('"', "''"))
    assert {key: letters[key] for key in "aäß1.,()-_"} == {key: plain.count(key) for key in "aäß1.,()-_"}


def counted_bleu(translations, references):
    """BLEU-4 as in Papineni et al. 2002, over words that are separated by spaces; every precision must be positive."""
    logs, lengths = 0.0, [0, 0]
    for order in range(1, 5):
        hits = total = 0
        for translation, reference in zip(translations, references, strict=True):
            ours, theirs = (
                Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
                for words in (translation.split(), reference.split())
            )
            hits += sum((ours & theirs).values())
            total += sum(ours.values())
        logs += math.log(hits / total) / 4
    lengths = [sum(len(text.split()) for text in side) for side in (translations, references)]
    return 100 * math.exp(logs + min(0.0, 1 - lengths[1] / lengths[0]))


def test_tokenized_score_is_bleu_over_the_words():
    translations = ["Ein Mann sagt: „Oma's Hund schläft“.", "zwei Kinder spielen im Garten"]
    references = ["Ein Mann sagt: „Omas Hund schläft.“", "Zwei Kinder spielen am Abend im Garten."]
    # Split by hand.
    ours = ['ein mann sagt : " oma \' s hund schläft " .', "zwei kinder spielen im garten"]
    theirs = ['ein mann sagt : " omas hund schläft " .', "zwei kinder spielen am abend im garten ."]
    scores = bleu_scores(translations, references, language="de")
    assert scores["bleu_tokenized"] == pytest.approx(counted_bleu(ours, theirs), abs=1e-9)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(translations, [references]).score, abs=1e-9)
    assert scores["bleu"] < scores["bleu_lowercased"]
    lowered = [[text.lower() for text in side] for side in (translations, references)]
    assert scores["bleu_lowercased"] == pytest.approx(sacrebleu.corpus_bleu(lowered[0], [lowered[1]]).score, abs=1e-9)


def test_signatures_say_case_and_tokenization():
    end = f"smooth:exp|version:{sacrebleu.__version__}"
    assert bleu_signatures("de") == {
        "bleu": f"nrefs:1|case:mixed|eff:no|tok:13a|{end}",
        "bleu_lowercased": f"nrefs:1|case:lc|eff:no|tok:13a|{end}",
        "bleu_tokenized": f"nrefs:1|case:lc|eff:no|tok:none|{end}",
        "words": "bleu_tokenized: lower case, Moses rules, language de",
    }


def test_no_warning_about_words_that_are_meant(caplog):
    bleu_scores(["ein Hund."] * 200, ["ein Hund."] * 200, language="de")
    assert not [record for record in caplog.records if record.name.startswith("sacrebleu")]
