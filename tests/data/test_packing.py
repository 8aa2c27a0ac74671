import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tameformer.data.documents import read_documents
from tameformer.data.keys import SampleKeys
from tameformer.data.packing import PackedDocuments, best_fit, pack_texts
from tameformer.data.tokenizers import train_bpe
from tameformer.errors import DataError

BEGIN, END, PADDING = 1, 2, 0


def keys(indices, *, seed=0, epoch=0):
    return SampleKeys(seed, epoch, np.asarray(indices, dtype=np.int64))


def documents_of(lengths):
    """Documents in which every token of the whole collection is another one, from 10 on."""
    ends = np.cumsum(lengths)
    return [np.arange(10 + end - length, 10 + end) for end, length in zip(ends, lengths, strict=True)]


def packed_of(documents, context, **settings):
    return PackedDocuments(documents, context, begin_id=BEGIN, end_id=END, padding_id=PADDING, **settings)


def pieces(batch):
    """(document, tokens, targets, positions) of each run of equal document numbers, window by window."""
    for row in range(len(batch["tokens"])):
        numbers = batch["documents"][row]
        for number in [n for n in numbers.unique_consecutive().tolist() if n >= 0]:
            here = numbers == number
            yield number, *(batch[name][row][here].tolist() for name in ("tokens", "targets", "positions"))


@settings(max_examples=150)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    context=st.integers(1, 16),
    seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_document_once_and_nothing_else(lengths, context, seed, epoch):
    documents = documents_of(lengths)
    packed = packed_of(documents, context)
    batch = packed.fetch(keys(np.arange(len(packed)), seed=seed, epoch=epoch))
    found = {number: {} for number in range(len(documents))}
    for number, tokens, targets, positions in pieces(batch):
        whole_inputs, whole_targets = [BEGIN, *documents[number].tolist()], [*documents[number].tolist(), END]
        begin = whole_targets.index(targets[0])
        assert targets == whole_targets[begin : begin + len(targets)]
        assert tokens == whole_inputs[begin : begin + len(tokens)]  # the token before each target, or begin
        assert positions == list(range(len(tokens)))
        assert begin not in found[number]
        found[number][begin] = len(targets)
    for number, parts in found.items():  # the pieces of a document lie end to end
        ends = [begin + size for begin, size in sorted(parts.items())]
        assert sorted(parts) == [0, *ends[:-1]]
        assert ends[-1] == len(documents[number]) + 1
        assert len(parts) == -(-(len(documents[number]) + 1) // context)  # no document is cut more than it must be
    padding = batch["documents"] == -1
    assert torch.equal(padding, batch["targets"] == -100)
    assert (batch["tokens"][padding] == PADDING).all()
    assert (batch["positions"][padding] == 0).all()
    assert batch["num_items"] == packed.total_targets == sum(lengths) + len(lengths)
    assert packed.padding_share == pytest.approx(padding.double().mean().item())
    assert {value.shape for name, value in batch.items() if name != "num_items"} == {(len(packed), context)}


def test_the_arrangement_is_a_function_of_seed_and_epoch():
    documents = documents_of(np.random.default_rng(0).integers(1, 30, 100))
    one, other = packed_of(documents, 16), packed_of(documents, 16)
    every = np.arange(len(one))
    seen = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        whole = one.fetch(keys(every, seed=seed, epoch=epoch))
        seen.append(whole["tokens"].flatten().tolist())
        for index in (7, 3):  # whatever the batch, and whatever was asked for before
            single = other.fetch(keys([index], seed=seed, epoch=epoch))
            for name in ("tokens", "targets", "documents", "positions"):
                assert torch.equal(single[name][0], whole[name][index])
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_long_documents_are_cut_elsewhere_in_another_epoch():
    packed = packed_of(documents_of([50]), 8)
    sizes = {
        tuple(len(tokens) for _, tokens, _, _ in sorted(pieces(packed.fetch(keys(np.arange(7), epoch=epoch)))))
        for epoch in range(20)
    }
    assert len(packed) == 7
    assert len(sizes) > 3


def test_short_documents_meet_others_in_another_epoch():
    packed = packed_of(documents_of(np.random.default_rng(0).integers(1, 6, 200)), 16)

    def companies(epoch):
        batch = packed.fetch(keys(np.arange(len(packed)), epoch=epoch))
        return {frozenset(row.unique().tolist()) for row in batch["documents"]}

    assert len(companies(0) & companies(1)) < 0.1 * len(packed)


def test_a_model_that_attends_within_documents_sees_no_other():
    batch = packed_of(documents_of([3, 4, 2]), 12).fetch(keys([0]))
    numbers = batch["documents"]
    mask = (numbers[:, :, None] == numbers[:, None, :]) & torch.ones(12, 12).tril().bool()
    assert mask.any(-1).all()
    first = batch["positions"] == 0
    assert (mask.sum(-1)[first & (numbers >= 0)] == 1).all()


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.booleans())
def test_best_fit_is_the_obvious_loop(sizes, decreasing):
    sizes = sorted(sizes, reverse=True) if decreasing else sizes
    bins, count = best_fit(np.array(sizes), 20)
    room: list[int] = []
    for size, chosen in zip(sizes, bins.tolist(), strict=True):
        fitting = [left for left in room if left >= size]
        if fitting:
            assert room[chosen] == min(fitting)
        else:
            assert chosen == len(room)
            room.append(20)
        room[chosen] -= size
    assert count == len(room)
    assert min(room) >= 0


def test_wrong_calls_are_refused():
    with pytest.raises(DataError, match="expected at least one document to pack, got none"):
        packed_of([], 8)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        packed_of(documents_of([3]), 0)


def test_packing_many_documents_wastes_little():
    lengths = np.random.default_rng(0).lognormal(4, 1, 20_000).astype(int)
    packed = packed_of([np.zeros(length, dtype=np.int64) for length in lengths], 256)
    assert packed.padding_share < 0.002


def test_real_books(shared_data):
    books = read_documents(shared_data / "classic_books" / "valid.jsonl.gz")
    chapters = [chapter for book in books for chapter in book.split("\n## ")]
    tokenizer = train_bpe(chapters, 600)
    packed = pack_texts(chapters, tokenizer, 256)
    assert packed.total_bytes == sum(len(chapter.encode("utf-8")) for chapter in chapters)
    batches = [packed.fetch(keys([index], epoch=3)) for index in range(len(packed))]
    assert sum(batch["num_items"] for batch in batches) == packed.total_targets
    assert packed.padding_share < 0.03
    texts = [""] * len(chapters)
    parts = sorted(
        (number, tokens[0] != BEGIN, targets) for batch in batches for number, tokens, targets, _ in pieces(batch)
    )
    first = {number: tokenizer.decode(targets) for number, later, targets in parts if not later}
    assert all(chapters[number].startswith(text.rstrip("\ufffd")) for number, text in first.items())
    assert len(first) == len(texts)
