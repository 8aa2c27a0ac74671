"""Decoding of connectionist temporal classification against the sum over all paths."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch

from tameformer.models import ctc_beam_search, ctc_greedy

BLANK = 2


def text_of(path) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK)


def probabilities(logits) -> dict[tuple[int, ...], float]:
    steps, sums = logits.double().softmax(-1).numpy(), defaultdict(float)
    for path in itertools.product(range(3), repeat=len(steps)):
        sums[text_of(path)] += float(np.prod([step[symbol] for step, symbol in zip(steps, path, strict=True)]))
    return sums


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_search_finds_the_most_probable_text(seed):
    logits = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(seed)) * 1.5
    outputs = torch.tensor([6, 4])
    found = ctc_beam_search(logits, outputs, blank=BLANK, num_beams=200)
    for row, count, text in zip(logits, outputs.tolist(), found, strict=True):
        sums = probabilities(row[:count])
        assert sums[tuple(text)] == pytest.approx(max(sums.values()), rel=1e-9)
    greedy = ctc_greedy(logits, outputs, blank=BLANK)
    for row, count, text in zip(logits, outputs.tolist(), greedy, strict=True):
        assert tuple(text) == text_of(row[:count].argmax(-1).tolist())


def test_the_search_adds_paths_up_where_the_best_path_misleads():
    # Graves 2006, figure: the blank is the best path twice, "a" the better text.
    logits = torch.tensor([[[0.4, 1e-9, 0.6], [0.4, 1e-9, 0.6]]]).log()
    outputs = torch.tensor([2])
    assert ctc_greedy(logits, outputs, blank=BLANK) == [[]]
    assert ctc_beam_search(logits, outputs, blank=BLANK, num_beams=4) == [[0]]
    with pytest.raises(ValueError, match="expected num_beams of at least 1, got 0"):
        ctc_beam_search(logits, outputs, blank=BLANK, num_beams=0)
