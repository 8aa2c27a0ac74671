import gzip
import json

import numpy as np
import pytest
import torch

from tameformer.data import SampleKeys
from tameformer.data.labelled import LabelledText, TokenizedTexts, classes_of, joined, read_labelled
from tameformer.data.length_buckets import LengthBuckets
from tameformer.errors import DataError

ROWS = [{"sentence": "a, b", "label": 1}, {"sentence": 'say "c"', "label": 0}]


def test_the_same_rows_from_every_kind_of_file(tmp_path):
    expected = [LabelledText("a, b", None, 1), LabelledText('say "c"', None, 0)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    (tmp_path / "a.csv").write_text('label,sentence\n1,"a, b"\n0,"say ""c"""\n')
    (tmp_path / "a.tsv").write_text('sentence\tlabel\na, b\t1\nsay "c"\t0\n')
    for name in ("a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv"):
        assert read_labelled(tmp_path / name, num_classes=2) == expected


def test_pairs(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"sentence1": "a", "sentence2": "b", "label": 0, "id": 5}) + "\n")
    assert read_labelled(tmp_path / "a.jsonl") == [LabelledText("a", "b", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a"}, r"line 3: no label; the columns are sentence, and every row needs a class"),
        ({"sentence": "a", "label": None}, r"line 3: no label"),
        (
            {"sentence": "a", "label": 2},
            r"line 3: label must be a class from 0 below 2, got 2; correct it, or raise data.num",
        ),
        ({"sentence": "a", "label": -1}, r"line 3: label must be a class from 0 below 2, got -1; -1 often stands for"),
        (
            {"sentence": "a", "label": "good"},
            r"line 3: label must be the number of a class, got 'good'; number them 0, 1",
        ),
        ({"sentence": "a", "label": 0.5}, r"line 3: label must be the number of a class, got 0.5"),
        ({"sentence": " ", "label": 1}, r"line 3: sentence must be text, got ' '"),
        ({"label": 1}, r"line 3: sentence must be text, got None"),
    ],
)
def test_a_bad_row_is_named(row, message, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*ROWS, row]))
    with pytest.raises(DataError, match=message):
        read_labelled(tmp_path / "a.jsonl", num_classes=2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [1, 2, 1],
            r"a\.jsonl, line 2: the label 2 is a class, but no row has class 0; correct the row, number the classes from",
        ),
        ([0, 1, 10], r"a\.jsonl, line 3: the label 10 is a class, but no row has class 2"),
        ([0, 0, 0], r"a\.jsonl, line 1, and all other rows, have class 0, so that there is nothing to tell apart"),
    ],
)
def test_classes_that_nobody_can_count_are_refused(labels, message, tmp_path):
    rows = [{"sentence": "a", "label": label} for label in labels]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    with pytest.raises(DataError, match=message):
        classes_of(read_labelled(tmp_path / "a.jsonl"))
    assert classes_of([LabelledText("a", None, label) for label in (2, 0, 1, 1)]) == 3


def test_files_of_another_form_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a", "label": 1}\n')
    with pytest.raises(DataError, match="has the columns body, label, none of which is text or sentence"):
        read_labelled(tmp_path / "a.jsonl")
    (tmp_path / "a.tsv").write_text("text\tlabel\na\n")
    with pytest.raises(DataError, match=r"a\.tsv, line 2: expected 2 columns as in line 1, got 1"):
        read_labelled(tmp_path / "a.tsv")
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"expected a name that ends in \.jsonl, \.csv or \.tsv"):
        read_labelled(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("text,label\na,1\na day, or two,0\n")
    with pytest.raises(
        DataError, match=r"a\.csv, row 2: more cells than columns, the last is '0'; quote texts that hold"
    ):
        read_labelled(tmp_path / "a.csv")
    (tmp_path / "b.tsv").write_text("text\tlabel\n")
    with pytest.raises(DataError, match="has no rows"):
        read_labelled(tmp_path / "b.tsv")


def test_batches_are_padded_to_their_longest():
    rows = [np.arange(1, count + 1) for count in (3, 5, 2)]
    source = TokenizedTexts(rows, np.array([0, 1, 1]), padding_id=0, segments=[row * 0 + 1 for row in rows])
    batch = source.fetch(SampleKeys(0, 0, np.array([2, 0])))
    assert batch["tokens"].tolist() == [[1, 2, 0], [1, 2, 3]]
    assert batch["real"].tolist() == [[True, True, False], [True, True, True]]
    assert batch["segments"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["num_items"] == 2


def test_long_pairs_lose_the_end_of_the_longer():
    first, second = np.arange(10, 20), np.arange(30, 33)
    for longest in (20, 12, 9):
        found = joined(first, second, begin_id=1, end_id=2, max_length=longest)
        assert len(found) == min(longest, 16)
        assert found[0] == 1
        assert (found == 2).sum() == 2
    assert found.tolist() == [1, 10, 11, 12, 2, 30, 31, 32, 2]


def test_buckets_hold_every_sample_once_and_pad_less():
    lengths = np.random.default_rng(0).integers(3, 60, 203)
    plan = LengthBuckets(lengths, 8, seed=3, pool=8)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * plan.steps_in_epoch(epoch), (epoch + 1) * plan.steps_in_epoch(epoch))
        batches = [plan.batch(step).indices for step in steps]
        assert len(set(np.concatenate(batches).tolist())) == 25 * 8
        epochs.append(batches)
    assert epochs[0][0].tolist() != epochs[1][0].tolist()
    assert plan.batch(30).indices.tolist() == epochs[1][5].tolist()
    sorted_whole = LengthBuckets(np.arange(200), 8, seed=3, pool=25)
    first, second = ([int(sorted_whole.batch(step).indices[0]) for step in range(at, at + 25)] for at in (0, 25))
    assert sorted(first) == sorted(second)  # the same batches in either epoch,
    assert first != second  # in another order
    shuffled = LengthBuckets(lengths, 8, seed=3, pool=1)
    padding = [
        sum(int(lengths[b].max()) * 8 - int(lengths[b].sum()) for b in (one.batch(step).indices for step in range(25)))
        for one in (plan, shuffled)
    ]
    assert padding[0] < 0.4 * padding[1]
    assert torch.tensor(plan.locate(26)).tolist() == [1, 1]
