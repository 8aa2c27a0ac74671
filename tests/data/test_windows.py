import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.data.keys import SampleKeys
from tameformer.data.text import read_text
from tameformer.data.tokenizers import CharTokenizer
from tameformer.data.windows import EvaluationWindows, TokenWindows
from tameformer.errors import DataError


def keys(indices, *, seed=0, epoch=0):
    return SampleKeys(seed, epoch, np.asarray(indices, dtype=np.int64))


@given(length=st.integers(2, 80), context=st.integers(1, 9), seed=st.integers(0, 9), epoch=st.integers(0, 9))
def test_an_epoch_shows_each_token_once_but_for_the_ends(length, context, seed, epoch):
    if length < 2 * context:
        with pytest.raises(DataError, match=f"has {length} tokens, expected at least {2 * context}"):
            TokenWindows(np.arange(length), context)
        return
    source = TokenWindows(np.arange(length), context)
    batch = source.fetch(keys(np.arange(len(source)), seed=seed, epoch=epoch))
    phase = source.phase(seed, epoch)
    seen = batch["tokens"].flatten().tolist()
    assert 0 <= phase < context
    assert seen == list(range(phase, phase + len(seen)))
    assert length - len(seen) < 2 * context
    assert torch.equal(batch["targets"], batch["tokens"] + 1)
    assert batch["num_items"] == len(seen)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64


def test_epochs_and_seeds_cut_differently_and_always_the_same():
    source = TokenWindows(np.arange(200), 64)
    phases = {(seed, epoch): source.phase(seed, epoch) for seed in range(3) for epoch in range(30)}
    assert len(set(phases.values())) > 30
    assert phases == {pair: TokenWindows(np.arange(200), 64).phase(*pair) for pair in reversed(phases)}
    assert TokenWindows(np.arange(200), 64, salt="other").phase(0, 0) != phases[0, 0]


def test_a_window_does_not_depend_on_its_batch():
    source = TokenWindows(np.random.default_rng(0).integers(0, 65, 1000), 16)
    whole = source.fetch(keys([5, 0, 61, 5], seed=3, epoch=2))
    for row, index in enumerate([5, 0, 61, 5]):
        assert torch.equal(source.fetch(keys([index], seed=3, epoch=2))["tokens"][0], whole["tokens"][row])
    with pytest.raises(IndexError):
        source.fetch(keys([len(source) + 1], seed=3, epoch=2))


@pytest.mark.parametrize("kind", [np.uint16, np.int64, torch.int32, "memmap"])
def test_streams_of_any_integer_kind(kind, tmp_path):
    if kind == "memmap":
        np.arange(50, dtype=np.uint8).tofile(tmp_path / "tokens")
        tokens = np.memmap(tmp_path / "tokens", dtype=np.uint8, mode="r")
    else:
        tokens = torch.arange(50, dtype=kind) if isinstance(kind, torch.dtype) else np.arange(50, dtype=kind)
    batch = TokenWindows(tokens, 8).fetch(keys([1]))
    assert torch.equal(batch["targets"], TokenWindows(np.arange(50), 8).fetch(keys([1]))["targets"])


def test_a_source_travels_to_another_process_at_its_size():
    source = TokenWindows(np.arange(10_000), 100)
    assert len(pickle.dumps(source)) < 90_000


@given(length=st.integers(2, 60), context=st.integers(1, 9), data=st.data())
def test_evaluation_scores_every_token_but_the_first_once(length, context, data):
    stride = data.draw(st.none() | st.integers(1, context))
    source = EvaluationWindows(np.arange(length), context, stride=stride)
    batch = source.fetch(keys(np.arange(len(source))))
    real = batch["targets"] != -100
    assert sorted(batch["targets"][real].tolist()) == list(range(1, length))
    assert torch.equal(batch["tokens"][real] + 1, batch["targets"][real])
    assert batch["num_items"] == source.total_targets == length - 1
    assert real.any(dim=1).all()  # no window for nothing
    again = source.fetch(keys(np.arange(len(source)), seed=5, epoch=7))
    assert torch.equal(again["tokens"], batch["tokens"])


def test_a_smaller_stride_gives_left_context():
    batch = EvaluationWindows(np.arange(10), 4, stride=2).fetch(keys([0, 1, 2, 3]))
    assert batch["tokens"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 0]]
    assert batch["targets"].tolist() == [[1, 2, 3, 4], [-100, -100, 5, 6], [-100, -100, 7, 8], [-100, -100, 9, -100]]


def test_wrong_streams_are_refused():
    with pytest.raises(DataError, match="has 1 tokens, expected at least 2"):
        EvaluationWindows(np.arange(1), 4)
    with pytest.raises(ValueError, match=r"stride must be in \[1, context\] = \[1, 4\], got 5"):
        EvaluationWindows(np.arange(9), 4, stride=5)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        TokenWindows(np.arange(9), 0)


def test_real_text_at_a_usual_split(shared_data):
    text = read_text(shared_data / "tiny_shakespeare" / "input.txt.gz")
    tokenizer = CharTokenizer.from_text(text)
    valid = tokenizer.encode(text[int(0.9 * len(text)) :])
    source = EvaluationWindows(valid, 64)
    batches = [source.fetch(keys([index])) for index in range(len(source))]
    predicted = np.concatenate([batch["targets"][batch["targets"] != -100].numpy() for batch in batches])
    np.testing.assert_array_equal(predicted, valid[1:])
    assert sum(batch["num_items"] for batch in batches) == 111_539
