import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, T5Config, T5ForConditionalGeneration

from tameformer.models import DecoderConfig, EncoderConfig, VisionConfig, decoder, encoder, vision_classifier
from tameformer.patch import Observation
from tameformer.probes.log_partition import LogPartition, find_logits, log_partition

KEY = "diag/log_partition/output"


def by_loop(logits):
    """ln Z of every token, and their mean; exp in float64 reaches to 700."""
    rows = logits.detach().double().flatten(0, -2)
    return sum(math.log(sum(math.exp(float(value)) for value in row)) for row in rows) / len(rows)


@given(scale=st.floats(0.01, 100), shift=st.floats(-300, 300), seed=st.integers(0, 1000))
def test_agreement_with_a_loop(scale, shift, seed):
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) * scale + shift
    assert float(log_partition(logits)) == pytest.approx(by_loop(logits), rel=1e-5, abs=1e-4)


def test_known_cases():
    assert float(log_partition(torch.full((4, 10), 7.0))) == pytest.approx(7 + math.log(10))
    assert float(log_partition(torch.tensor([[1e4, 0.0]]))) == 1e4
    logits = torch.randn(4, 10).bfloat16()
    assert log_partition(logits).dtype == torch.float32
    assert float(log_partition(logits)) == pytest.approx(by_loop(logits), rel=1e-5)
    logits[0, 0] = torch.nan
    assert log_partition(logits).isnan()
    assert not log_partition(torch.tensor([[torch.inf, 0.0]])).isfinite()


def test_where_logits_are_found():
    logits, other = torch.zeros(2, 3), torch.zeros(2, 4)
    assert find_logits(logits) is logits
    assert find_logits({"loss": torch.tensor(0.0), "logits": logits}) is logits
    assert find_logits((logits, torch.tensor(0.0))) is logits
    assert find_logits((torch.tensor(0.0), logits, None)) is logits
    for none in (torch.tensor(1.0), torch.zeros(5), torch.zeros(5, 1), logits.long(), None, {"hidden": logits}, "x"):
        assert find_logits(none) is None
    assert find_logits((logits, other)) is None  # which of the two cannot be known


def observed(model, *args, probe=None, **kwargs):
    probe = LogPartition(tokens=None) if probe is None else probe
    with Observation(model, [probe]).watching():
        output = model(*args, **kwargs)
    return probe, output


def test_our_models():
    torch.manual_seed(0)
    language = decoder(DecoderConfig(dim=16, num_layers=1, num_heads=2, max_length=8), vocab_size=11)
    probe, output = observed(language, torch.arange(16).reshape(2, 8) % 11)
    assert float(probe.read()[KEY]) == pytest.approx(by_loop(output.detach()), rel=1e-5)
    assert not probe.unseen
    config = VisionConfig(dim=16, num_layers=1, num_heads=2, patch_size=4)
    vision = vision_classifier(config, num_classes=10, image_size=8, channels=1)
    probe, output = observed(vision, torch.randn(3, 1, 8, 8))
    assert float(probe.read()[KEY]) == pytest.approx(by_loop(output.detach()), rel=1e-5)


def test_hugging_face_models():
    torch.manual_seed(0)
    small = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**small, intermediate_size=32, num_labels=3))
    tokens = torch.arange(16).reshape(2, 8) % 11
    probe, output = observed(model, tokens, labels=torch.tensor([0, 2]))
    assert float(probe.read()[KEY]) == pytest.approx(by_loop(output.logits.detach()), rel=1e-5)
    config = T5Config(vocab_size=16, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=32, decoder_start_token_id=0)
    probe, output = observed(T5ForConditionalGeneration(config), tokens, labels=tokens)
    assert output.logits.shape[-1] == 16  # as wide as the stream, but called logits
    assert float(probe.read()[KEY]) == pytest.approx(by_loop(output.logits.detach()), rel=1e-5)


def test_models_without_logits_say_so():
    torch.manual_seed(0)
    tokens = torch.arange(16).reshape(2, 8) % 11
    ours = encoder(EncoderConfig(dim=16, num_layers=1, num_heads=2, max_length=8), vocab_size=11)
    small = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**small, intermediate_size=32))
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    for model, x, reason in (
        (ours, tokens, "as wide as its stream, 16"),
        (layers, torch.randn(2, 8, 16), "as wide as its stream, 16"),
        (bert, tokens, "BaseModelOutputWithPoolingAndCrossAttentions"),
    ):
        probe, _ = observed(model, x)
        assert probe.read() == {}
        assert reason in probe.unseen["log_partition"]


def test_a_user_may_say_where_the_logits_are():
    torch.manual_seed(0)
    tokens = torch.arange(16).reshape(2, 8) % 11
    model = decoder(DecoderConfig(dim=16, num_layers=1, num_heads=2, max_length=8), vocab_size=16)
    probe, output = observed(model, tokens)
    assert probe.unseen
    probe, output = observed(model, tokens, probe=LogPartition(tokens=None, logits=lambda output: output))
    assert float(probe.read()[KEY]) == pytest.approx(by_loop(output.detach()), rel=1e-5)
    assert not probe.unseen


def test_a_few_tokens_stand_for_all_and_a_step_forgets_the_one_before():
    torch.manual_seed(0)
    model = decoder(DecoderConfig(dim=16, num_layers=1, num_heads=2, max_length=8), vocab_size=11)
    probe, tokens = LogPartition(tokens=4), torch.arange(16).reshape(2, 8) % 11
    observation = Observation(model, [probe])
    with observation.watching():
        output = model(tokens)
    expected = by_loop(output.detach().flatten(0, 1)[[0, 5, 10, 15]])
    assert float(probe.read()[KEY]) == pytest.approx(expected, rel=1e-5)
    with observation.watching():
        assert not probe.read()


def test_a_model_without_a_stream_after_one_whose_stream_was_as_wide():
    probe, tokens = LogPartition(), torch.arange(16).reshape(2, 8) % 11
    observed(encoder(EncoderConfig(dim=16, num_layers=1, num_heads=2), vocab_size=11), tokens, probe=probe)
    assert probe.unseen
    _, output = observed(nn.Linear(4, 16), torch.randn(3, 4), probe=probe)
    assert not probe.unseen
    assert float(probe.read()[KEY]) == pytest.approx(by_loop(output), rel=1e-5)
