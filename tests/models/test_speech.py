"""Speech recognizers: padding is not read, and both heads write what they are asked for."""

import pytest
import torch

from tameformer.models import (
    RecurrentSpeechConfig,
    SpeechConfig,
    recurrent_recognizer,
    speech_recognizer,
    transcription_steps,
)
from tameformer.models.generate import greedy

SMALL = {"dim": 16, "subsampling": 4}


def build(kind):
    torch.manual_seed(0)
    told = {"num_features": 5, "vocab_size": 7}
    if kind == "lstm":
        return recurrent_recognizer(RecurrentSpeechConfig(num_layers=1, **SMALL), **told).double().eval()
    return speech_recognizer(SpeechConfig(head=kind, num_layers=2, num_heads=2, **SMALL), **told).double().eval()


@pytest.fixture
def features():
    return torch.randn(2, 13, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["ctc", "decoder", "lstm"])
def test_an_utterance_does_not_depend_on_its_batch(kind, features):
    model, frames = build(kind), torch.tensor([13, 9])
    features[1, 9:] = 0
    extra = (torch.tensor([[7, 1, 2], [7, 3, 8]]),) if kind == "decoder" else ()
    together = model(features, frames, *extra)
    alone = model(features[1:, :9], frames[1:], *(one[1:] for one in extra))
    if kind == "decoder":
        assert together.shape == (2, 3, 9)
        torch.testing.assert_close(together[1], alone[0], rtol=0, atol=1e-12)
    else:
        (logits, outputs), (single, _) = together, alone
        assert outputs.tolist() == [4, 3]  # a quarter, rounded up twice
        torch.testing.assert_close(logits[1, :3], single[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["ctc", "decoder", "lstm"])
def test_gradients_reach_every_parameter(kind, features):
    model, frames = build(kind), torch.tensor([13, 9])
    out = model(features, frames, torch.tensor([[7, 1], [7, 3]])) if kind == "decoder" else model(features, frames)[0]
    out.square().sum().backward()
    unreached = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()]
    assert [name for name in unreached if not name.endswith("key.bias")] == []


def test_writing_step_by_step_is_the_decoder_at_once(features):
    model, frames = build("decoder"), torch.tensor([13, 9])
    features[1, 9:] = 0
    tokens = greedy(transcription_steps(model, features, frames), max_new_tokens=5, end_id=model.end_id)
    begun = torch.cat([torch.full((2, 1), model.begin_id), tokens], dim=1)
    expected = model(features, frames, begun[:, :-1]).argmax(-1)
    for row, wanted in zip(tokens.tolist(), expected.tolist(), strict=True):
        ended = row.index(model.end_id) + 1 if model.end_id in row else len(row)
        assert row[:ended] == wanted[:ended]
    with pytest.raises(ValueError, match="expected a model in evaluation mode"):
        transcription_steps(model.train(), features, frames)


def test_a_subsampling_without_strides_is_refused():
    for config in (SpeechConfig, RecurrentSpeechConfig):
        with pytest.raises(ValueError, match="expected subsampling to be one of 1, 2, 4, got 3"):
            config(subsampling=3)
