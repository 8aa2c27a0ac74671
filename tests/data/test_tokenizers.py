import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tameformer.data import tokenizers as module
from tameformer.data.text import read_lines, read_text
from tameformer.data.tokenizers import BPETokenizer, CharTokenizer, cached_bpe, train_bpe
from tameformer.errors import DataError

TEXTS = ["the cat sat on the mat", "die Katze saß auf der Matte", "the other cat", "eine andere Katze"] * 3


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return train_bpe(TEXTS, 290)


@given(st.text(min_size=1))
@example("\ud800 a half surrogate")
def test_characters_round_trip(text):
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    assert tokenizer.characters == tuple(sorted(set(text)))
    assert ids.tolist() == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(ids) == text
    again = CharTokenizer.from_json(tokenizer.to_json())
    assert again.characters == tokenizer.characters


def test_a_character_vocabulary_is_saved_in_one_file(tmp_path):
    CharTokenizer.from_text("äb\n").save(tmp_path / "chars.json")
    assert CharTokenizer.load(tmp_path / "chars.json").characters == ("\n", "b", "ä")
    (tmp_path / "other.json").write_text('{"type": "words"}')
    with pytest.raises(DataError, match="not a character vocabulary"):
        CharTokenizer.load(tmp_path / "other.json")


def test_an_unknown_character_is_named():
    tokenizer = CharTokenizer.from_text("abd")
    with pytest.raises(DataError, match=r"character 'c' \(U\+0063\) at position 2 is not among the 3 characters"):
        tokenizer.encode("abcz")
    with pytest.raises(DataError, match=r"U\+1F600"):
        tokenizer.encode("\U0001f600")
    assert tokenizer.encode("").shape == (0,)


def test_an_unknown_character_id_is_refused():
    tokenizer = CharTokenizer.from_text("abc")
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"expected ids in \[0, 3\), got {wrong}"):
            tokenizer.decode([0, wrong])
    with pytest.raises(ValueError, match="expected one or more single characters"):
        CharTokenizer([])


@settings(max_examples=300)
@given(st.text())
@example("<pad> <end>the<begin>\x00\n\n  \t\u2028 \U0001f469\u200d\U0001f469 e\u0301 ﬁ")
def test_bytes_round_trip_any_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert ids.dtype == np.int64
    assert not len(ids) or 3 <= ids.min() <= ids.max() < bpe.vocab_size


def test_a_batch_is_encoded_as_one_by_one(bpe):
    texts = ["the cat", "", "<end>", "Größe"]
    for ids, text in zip(bpe.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))


def test_merges_are_learnt_and_the_size_is_met(bpe, caplog):
    assert bpe.vocab_size == 290
    assert len(bpe.encode("the cat")) <= 3
    assert train_bpe(["ab"], 1000).vocab_size == 256 + 3
    assert "the text gave 259 tokens of the 1000 asked for" in caplog.text


def test_special_ids_come_first_and_decode_to_nothing(bpe):
    assert (bpe.padding_id, bpe.begin_id, bpe.end_id) == (0, 1, 2)
    assert bpe.decode([1, *bpe.encode("mat").tolist(), 2, 0, 0]) == "mat"
    more = train_bpe(TEXTS, 300, special_tokens=("<|pad|>", "<|bos|>", "<|eos|>", "<mask>"))
    assert [more.decode([number]) for number in range(4)] == [""] * 4
    assert more.encode("a<mask>").min() > 3


def test_training_is_deterministic_and_joint(bpe):
    assert train_bpe(TEXTS, 290).to_json() == bpe.to_json()
    vocabulary = json.loads(bpe.to_json())["model"]["vocab"]
    assert {"the", "ĠKatze"} <= vocabulary.keys()


def test_ids_may_be_a_list_an_array_or_a_tensor(bpe):
    for tokenizer in (bpe, CharTokenizer.from_text("the cat")):
        ids = tokenizer.encode("the cat")
        assert [tokenizer.decode(each) for each in (ids, ids.tolist(), torch.from_numpy(ids))] == ["the cat"] * 3


def test_a_saved_tokenizer_is_the_same(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    again = BPETokenizer.load(tmp_path / "tokenizer.json")
    assert again.to_json() == bpe.to_json()
    for text in ("the cat <end>", "Straße"):
        np.testing.assert_array_equal(again.encode(text), bpe.encode(text))


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"version": "1.0", "model": {}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        BPETokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_our_special_ids_is_refused(bpe, tmp_path):
    content = json.loads(bpe.to_json())
    content["added_tokens"] = content["added_tokens"][:2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"expected ids 0, 1, 2 to be padding, begin and end, got special ids \[0, 1\]"):
        BPETokenizer.load(tmp_path / "tokenizer.json")


def test_wrong_training_calls_are_refused():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 259 .* got 258"):
        train_bpe(TEXTS, 258)
    with pytest.raises(ValueError, match="must look like <word>"):
        train_bpe(TEXTS, 300, special_tokens=("pad", "<begin>", "<end>"))
    with pytest.raises(ValueError, match="distinct names"):
        train_bpe(TEXTS, 300, special_tokens=("<a>", "<a>", "<end>"))
    with pytest.raises(DataError, match="got 2 texts, none with a character"):
        train_bpe(["", ""], 300)


def test_the_cache_is_used_and_guards_what_it_was_trained_from(tmp_path, monkeypatch):
    path = tmp_path / "run" / "tokenizer.json"
    first = cached_bpe(TEXTS, 280, path)
    written = path.read_bytes()
    monkeypatch.setattr(module, "train_bpe", None)  # from here on nothing may be trained
    assert cached_bpe(TEXTS, 280, path).to_json() == first.to_json()
    assert BPETokenizer.load(path).to_json() == first.to_json()
    shifted = [TEXTS[0] + TEXTS[1][:3], TEXTS[1][3:], *TEXTS[2:]]
    for texts, size in ((TEXTS[1:], 280), (TEXTS, 281), (shifted, 280)):
        with pytest.raises(DataError, match="trained from other texts or settings"):
            cached_bpe(texts, size, path)
    assert path.read_bytes() == written


def test_the_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "tameformer\[text\]"'):
        train_bpe(TEXTS, 300)


def test_real_characters(shared_data):
    text = read_text(shared_data / "tiny_shakespeare" / "input.txt.gz")
    tokenizer = CharTokenizer.from_text(text)
    assert (len(text), tokenizer.vocab_size) == (1_115_394, 65)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_real_sentences(shared_data):
    lines = [line for code in ("en", "de") for line in read_lines(shared_data / "multi30k" / f"val.{code}.gz")]
    tokenizer = train_bpe(lines, 2000)
    assert tokenizer.vocab_size == 2000
    encoded = tokenizer.encode_batch(lines)
    assert [tokenizer.decode(ids) for ids in encoded] == lines
    assert sum(map(len, encoded)) < 0.4 * sum(map(len, lines))  # about three characters a token
