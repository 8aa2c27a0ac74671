import gzip

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data.keys import SampleKeys
from tameformer.data.pairs import PairSource, read_pairs, read_pairs_tsv, tokenized_pairs
from tameformer.data.tokenizers import train_bpe
from tameformer.errors import DataError

PADDING, BEGIN, END = 0, 1, 2


def keys(indices):
    return SampleKeys(0, 0, np.asarray(indices, dtype=np.int64))


def source_of(source, target, **settings):
    arrays = [[np.array(ids, dtype=np.int64) for ids in side] for side in (source, target)]
    return PairSource(*arrays, padding_id=PADDING, begin_id=BEGIN, end_id=END, **settings)


def write(path, text):
    path.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    return path


def test_two_files_are_read_line_by_line(tmp_path):
    source = write(tmp_path / "a.en.gz", "one\u2028still one\ntwo\n")
    target = write(tmp_path / "a.de", "eins\r\nzwei")
    assert read_pairs(source, target) == [("one\u2028still one", "eins"), ("two", "zwei")]


def test_unequal_files_are_refused_with_both_counts(tmp_path):
    source, target = write(tmp_path / "a.en", "one\ntwo\nthree\n"), write(tmp_path / "a.de", "eins\nzwei\n")
    with pytest.raises(DataError, match=r"a\.en has 3 lines and .*a\.de has 2; expected line i"):
        read_pairs(source, target)


def test_a_table_is_read_line_by_line(tmp_path):
    assert read_pairs_tsv(write(tmp_path / "a.tsv.gz", "one\teins\ntwo\tzwei\n")) == [("one", "eins"), ("two", "zwei")]
    with pytest.raises(
        DataError, match=r"b\.tsv, line 2: expected 2 columns with a tab between, got 3: 'two\\tzwei\\tby"
    ):
        read_pairs_tsv(write(tmp_path / "b.tsv", "one\teins\ntwo\tzwei\tby whom\n"))
    with pytest.raises(DataError, match=r"c\.tsv, line 2: .* got 1: ''"):
        read_pairs_tsv(write(tmp_path / "c.tsv", "one\teins\n\n"))


def test_two_columns_of_a_table_are_chosen_in_either_direction(tmp_path):
    """As Tatoeba's exports have them: a third column says who wrote it."""
    table = write(tmp_path / "a.tsv", "one\teins\tby whom\ntwo\tzwei\tby whom\n")
    assert read_pairs_tsv(table, columns=(2, 1)) == [("eins", "one"), ("zwei", "two")]
    with pytest.raises(DataError, match=r"a\.tsv, line 1: expected columns 1 and 4, got 3"):
        read_pairs_tsv(table, columns=(1, 4))
    with pytest.raises(DataError, match=r"b\.tsv \(column 2\), line 1 is empty"):
        read_pairs_tsv(write(tmp_path / "b.tsv", "one\t\n"), columns=(2, 1))
    for wrong in ((1, 1), (0, 1)):
        with pytest.raises(ValueError, match="columns must be two different numbers from 1"):
            read_pairs_tsv(table, columns=wrong)


def test_empty_sides_are_named_or_dropped(tmp_path, caplog):
    source, target = write(tmp_path / "a.en", "one\ntwo\n\n"), write(tmp_path / "a.de", "eins\n \ndrei\n")
    with pytest.raises(DataError, match=r"a\.de, line 2 is empty \(2 of 3 pairs"):
        read_pairs(source, target)
    assert read_pairs(source, target, empty="drop") == [("one", "eins")]
    assert "dropped 2 of 3 pairs" in caplog.text
    with pytest.raises(DataError, match=r"a\.tsv \(column 1\), line 1 is empty"):
        read_pairs_tsv(write(tmp_path / "a.tsv", "\teins\n"))
    with pytest.raises(DataError, match="none of 1 pairs has text on both sides"):
        read_pairs_tsv(write(tmp_path / "a.tsv", "\teins\n"), empty="drop")


def test_a_batch_in_full():
    source = source_of([[7, 8, 9], [7]], [[5], [5, 6]])
    batch = source.fetch(keys([1, 0]))
    assert batch["source"].tolist() == [[7, 2, 0, 0], [7, 8, 9, 2]]
    assert batch["source_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert batch["target_in"].tolist() == [[1, 5, 6], [1, 5, 0]]
    assert batch["targets"].tolist() == [[5, 6, 2], [5, 2, -100]]
    assert batch["num_items"] == 5
    assert source.lengths.tolist() == [[4, 2], [2, 3]]
    assert {batch[name].dtype for name in ("source", "target_in", "targets")} == {torch.int64}


@given(
    sentences=st.lists(st.tuples(*[st.lists(st.integers(3, 20), max_size=9)] * 2), min_size=1, max_size=8),
    multiple=st.sampled_from([1, 3, 8]),
    data=st.data(),
)
def test_batches_hold_their_pairs_and_padding_only(sentences, multiple, data):
    source = source_of(*zip(*sentences, strict=True), multiple=multiple)
    rows = data.draw(st.lists(st.integers(0, len(sentences) - 1), min_size=1, max_size=8))
    batch = source.fetch(keys(rows))
    for place, row in enumerate(rows):
        one, other = sentences[row]
        mask = batch["source_mask"][place]
        assert batch["source"][place][mask].tolist() == [*one, END]
        assert (batch["source"][place][~mask] == PADDING).all()
        real = batch["targets"][place] != -100
        assert batch["targets"][place][real].tolist() == [*other, END]
        assert batch["target_in"][place][real].tolist() == [BEGIN, *other]
        assert (batch["target_in"][place][~real] == PADDING).all()
    assert batch["num_items"] == sum(len(sentences[row][1]) + 1 for row in rows)
    for name, side in (("source", 0), ("targets", 1)):
        longest = max(len(sentences[row][side]) + 1 for row in rows)
        assert batch[name].shape[1] == -(-longest // multiple) * multiple


def test_long_pairs_are_dropped_and_counted_or_refused(caplog):
    sides = [[3] * 4, [3] * 3, [3]], [[3], [3, 3], [3] * 5]
    source = source_of(*sides, max_length=4)
    assert source.kept.tolist() == [1]
    assert len(source) == 1
    assert source.fetch(keys([0]))["targets"].tolist() == [[3, 3, END]]
    assert "dropped 2 of 3 pairs longer than 4 tokens" in caplog.text
    with pytest.raises(DataError, match=r"pair 0 has 5 source and 2 target tokens.* 2 of 3 pairs exceed max_length 4"):
        source_of(*sides, max_length=4, too_long="refuse")
    with pytest.raises(DataError, match=r"no pair remains of 3 within max_length 2; the shortest has 4 tokens"):
        source_of(*sides, max_length=2)
    with pytest.raises(DataError, match="no pair remains of 0"):
        source_of([], [])
    with pytest.raises(DataError, match="as many sources as targets, got 1 and 0"):
        source_of([[3]], [])


def test_real_pairs(shared_data):
    folder = shared_data / "multi30k"
    pairs = read_pairs(folder / "val.en.gz", folder / "val.de.gz")
    assert len(pairs) == 1014
    tokenizer = train_bpe([text for pair in pairs for text in pair], 1000)
    source = tokenized_pairs(pairs, tokenizer, multiple=8)
    rows = [5, 1013, 0]
    batch = source.fetch(keys(rows))
    assert [tokenizer.decode(ids) for ids in batch["source"]] == [pairs[row][0] for row in rows]
    assert [tokenizer.decode(ids) for ids in batch["target_in"]] == [pairs[row][1] for row in rows]
    table = read_pairs_tsv(shared_data / "tatoeba_de_en" / "valid.tsv.gz")
    assert len(table) == 2000
