"""The recurrent encoder-decoder is the published one, step by step, and decodes what it was trained to."""

import pytest
import torch

from tameformer.models import beam_search, greedy
from tameformer.models.recurrent_translation import (
    RecurrentSteps,
    RecurrentTranslationConfig,
    recurrent_translation,
)
from tameformer.patch import Observation
from tameformer.probes import AttentionEntropy

SOURCE = torch.tensor([[5, 6, 7, 2], [8, 2, 0, 0]])
TARGET = torch.tensor([[1, 9, 4], [1, 3, 3]])


def built(attention="additive"):
    torch.manual_seed(0)
    config = RecurrentTranslationConfig(dim=8, attention=attention, max_length=20)
    return recurrent_translation(config, vocab_size=12, padding_id=0).double().eval()


@torch.no_grad()
def test_attention_is_bahdanaus_word_by_word():
    """Equations of the paper's appendix A.1.2, one sentence at a time, without padding and without a batch."""
    model, probe, rows = built(), AttentionEntropy(), []
    with Observation(model, [probe]).watching():
        got = model(SOURCE, TARGET)
    assert got.equal(model(SOURCE, TARGET))
    embed, score = model.embedding.weight, model.attention.score
    for row, length in ((0, 4), (1, 2)):
        states, _ = model.encoder.recurrence(embed[SOURCE[row, :length]][None])
        annotations = states[0]
        state = torch.tanh(model.first(annotations[0]))
        for place, token in enumerate(TARGET[row].tolist()):
            energies = [
                score.vector[0] @ torch.tanh(score.query_weight[0].T @ state + score.key_weight[0].T @ h)
                for h in annotations
            ]
            weights = torch.stack(energies).softmax(0)
            context = sum(weight * h for weight, h in zip(weights, annotations, strict=True))
            state = model.cell(torch.cat([embed[token], context])[None], state[None])[0]
            hidden = torch.tanh(model.output(torch.cat([state, context, embed[token]])))
            torch.testing.assert_close(got[row, place], embed[:12] @ hidden)
            rows.append((-(weights * weights.log()).sum(), torch.stack(energies).max(), torch.tensor(length).log()))
    # The probe sees every step of every sentence, as queries of one attention.
    entropy, largest, ceiling = (torch.stack(column).double() for column in zip(*rows, strict=True))
    for name, expected in (
        ("", entropy.mean()), ("_min", entropy.min()), ("_max", ceiling.mean()), ("logit_max", largest.max()),
    ):  # fmt: skip
        key = name if name.startswith("logit") else f"entropy{name}"
        assert probe.read()[f"diag/attention_{key}/attention"].item() == pytest.approx(expected.item(), abs=1e-6), key


@torch.no_grad()
@pytest.mark.parametrize("attention", ["additive", "none"])
def test_padding_changes_nothing_and_steps_are_the_whole(attention):
    model = built(attention)
    whole = model(SOURCE, TARGET)
    torch.testing.assert_close(model(SOURCE[1:, :2], TARGET[1:]), whole[1:])
    steps = RecurrentSteps(model, SOURCE, SOURCE != 0, 1)
    for place in range(3):
        torch.testing.assert_close(steps.advance(TARGET[:, place : place + 1]), whole[:, place])
    both = RecurrentSteps(model, SOURCE, SOURCE != 0, 1)
    torch.testing.assert_close(both.advance(TARGET), whole[:, -1])
    # A beam of one is greedy; rows are exchanged with their source.
    found, _ = beam_search(RecurrentSteps(model, SOURCE, SOURCE != 0, 1), num_beams=1, max_new_tokens=6, end_id=2)
    best = greedy(RecurrentSteps(model, SOURCE, SOURCE != 0, 1), max_new_tokens=6, end_id=2)
    assert found[:, : best.shape[1]].tolist() == best.tolist()
    swapped = RecurrentSteps(model, SOURCE, SOURCE != 0, 1)
    swapped.select(torch.tensor([1, 0]), same_source=False)
    torch.testing.assert_close(swapped.advance(TARGET[:, :1].flip(0)), whole[:, 0].flip(0))


@torch.no_grad()
def test_without_attention_one_vector_stands_for_the_source():
    model = built("none")
    memory, mask = model.encode(SOURCE, source_mask=SOURCE != 0), SOURCE != 0
    first, second = (model.context(torch.randn(2, 8, dtype=torch.float64), memory, mask) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first[1], torch.cat([memory[1, 1, :4], memory[1, 0, 4:]]))
    with pytest.raises(ValueError, match="this model has no attention"):
        model.alignment(first, memory, mask)
    attending = built()
    shares = attending.alignment(first, memory, mask)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert (shares[1, 2:] == 0).all()
