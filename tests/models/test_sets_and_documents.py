import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tameformer as tame
from tameformer.errors import ConfigError
from tameformer.models import (
    Architecture,
    HierarchicalConfig,
    SetConfig,
    TokenSetConfig,
    hierarchical_classifier,
    set_classifier,
    token_set_classifier,
)
from tameformer.nn.query_pooling import QueryPooling

SMALL = {"dim": 16, "num_heads": 4}
DOCUMENTS = torch.tensor([[[3, 4, 5, 0], [6, 7, 0, 0], [0, 0, 0, 0]], [[8, 0, 0, 0], [9, 3, 4, 8], [5, 5, 0, 0]]])


def of_sets(**settings_):
    torch.manual_seed(0)
    return set_classifier(SetConfig(**SMALL, **settings_), input_size=12, num_classes=3).double().eval()


def of_documents(**settings_):
    torch.manual_seed(0)
    config = HierarchicalConfig(**SMALL, **settings_)
    model = hierarchical_classifier(config, vocab_size=12, num_classes=3, padding_id=0).double().eval()
    nn.init.normal_(model.embedding.weight)
    return model


@pytest.mark.parametrize("pooling", ["class_token", "mean", "max", "attention", "softmax"])
@pytest.mark.parametrize("kind", ["tokens", "vectors"])
@settings(max_examples=5)
@given(size=st.integers(1, 6), padding=st.integers(0, 3), seed=st.integers(0, 2**31))
def test_order_and_padding_change_nothing(kind, pooling, size, padding, seed):
    torch.manual_seed(seed)
    model = of_sets(elements=kind, pooling=pooling)
    elements = torch.randint(12, (2, size)) if kind == "tokens" else torch.randn(2, size, 12, dtype=torch.float64)
    expected, order = model(elements), torch.randperm(size)
    torch.testing.assert_close(model(elements[:, order]), expected, rtol=1e-11, atol=1e-11)
    padded = torch.cat([elements, elements.new_ones(2, padding, *elements.shape[2:])], 1)
    shuffled = torch.randperm(size + padding)
    real = torch.arange(size + padding).expand(2, -1) < size
    torch.testing.assert_close(model(padded[:, shuffled], real=real[:, shuffled]), expected, rtol=1e-11, atol=1e-11)


@settings(max_examples=10)
@given(size=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_a_text_is_the_multiset_of_its_tokens(size, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(0)
    model = token_set_classifier(TokenSetConfig(**SMALL), vocab_size=12, num_classes=3).double().eval()
    tokens = torch.randint(12, (1, size), generator=generator)
    expected, order = model(tokens), torch.randperm(size, generator=generator)
    torch.testing.assert_close(model(tokens[:, order]), expected, rtol=1e-11, atol=1e-11)
    other = (tokens[:, :1] + 1) % 12
    once, twice = torch.cat([tokens[:, :1], other], 1), torch.cat([tokens[:, :1], tokens[:, :1], other], 1)
    assert (model(twice) - model(once)).abs().max() > 1e-6  # how often counts


def test_texts_go_through_a_dropped_head_in_training_only():
    torch.manual_seed(0)
    model = token_set_classifier(TokenSetConfig(**SMALL, head_dropout=0.5), vocab_size=12, num_classes=3)
    tokens = torch.tensor([[3, 4]])
    assert not model(tokens).equal(model(tokens))
    assert model.eval()(tokens).equal(model(tokens))
    with pytest.raises(ValueError, match=r"expected 0 <= head_dropout < 1, got 1\.0"):
        TokenSetConfig(head_dropout=1.0)


def test_outputs_at_elements_move_with_them():
    model, elements = of_sets(), torch.randn(2, 5, 12, dtype=torch.float64)
    order = torch.randperm(5)
    moved = model.features(elements[:, order])
    torch.testing.assert_close(moved, model.features(elements)[:, order], rtol=1e-11, atol=1e-11)


def test_sets_have_no_positions():
    plain = Architecture.of(SetConfig(), input_size=12, num_classes=3).to_plain()
    with pytest.raises(ConfigError, match="positions"):
        Architecture.from_plain({**plain, "config": {**plain["config"], "positions": "learned"}})
    with pytest.raises(ValueError, match="got windowed: it knows an order"):
        SetConfig(attention="windowed", radius=2)


@pytest.mark.parametrize("encoder", ["gru", "transformer"])
def test_documents_do_not_depend_on_what_they_are_batched_with(encoder):
    model = of_documents(encoder=encoder)
    both = model(DOCUMENTS)
    torch.testing.assert_close(model(DOCUMENTS[:1, :2, :3]), both[:1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(model(DOCUMENTS[1:]), both[1:], rtol=1e-11, atol=1e-11)
    nonsense = DOCUMENTS.masked_fill(DOCUMENTS == 0, 7)
    torch.testing.assert_close(model(nonsense, real=DOCUMENTS > 0), both, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(model(DOCUMENTS[:, [1, 0, 2]]), both)  # sentences have an order


@pytest.mark.parametrize("encoder", ["gru", "transformer"])
def test_attention_says_what_the_document_was_classified_by(encoder):
    model = of_documents(encoder=encoder)
    words, sentences = model.attention(DOCUMENTS)
    real = DOCUMENTS > 0
    torch.testing.assert_close(words.sum(-1), real.any(-1).double())
    torch.testing.assert_close(sentences.sum(-1), torch.ones(2, dtype=torch.float64))
    assert not words[~real].any()
    assert not sentences[~real.any(-1)].any()
    # The classification from these weights is the classification.
    encoded = model.word_encoder(model.embedding(DOCUMENTS[0, :2]), real[0, :2])
    vectors = torch.einsum("sw,swd->sd", words[0, :2], encoded)[None]
    document = sentences[:1, :2] @ model.sentence_encoder(vectors, real[:1, :2].any(-1))[0]
    torch.testing.assert_close(model.head(document), model(DOCUMENTS[:1]), rtol=1e-11, atol=1e-11)


def test_query_pooling_is_the_papers_formula():
    pooling, x = QueryPooling(6, hidden_dim=4).double(), torch.randn(1, 5, 6, dtype=torch.float64)
    logits = torch.stack([pooling.query @ torch.tanh(pooling.key(vector)) for vector in x[0, :3]])
    expected = logits.softmax(0) @ x[0, :3]
    real = torch.arange(5)[None] < 3
    torch.testing.assert_close(pooling(x, real)[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model_of", [of_sets, of_documents, lambda: of_documents(encoder="transformer")])
def test_models_learn_are_rebuilt_probed_and_stabilized(model_of):
    model = model_of().float()
    batch = DOCUMENTS if hasattr(model, "padding_id") else torch.randn(2, 5, 12)
    model(batch).square().sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in unreached if not name.endswith("key.bias")] == []
    report = tame.diagnose(model, batch)
    is_recurrent = "word_encoder.recurrence.weight_ih_l0" in model.state_dict()
    attended = [key for key in report.values if key.startswith("diag/attention_entropy/")]
    assert bool(attended)
    assert is_recurrent == (not any("stack.layers" in key for key in attended))
    before = model(batch)
    with tame.sigma_reparam(model):
        assert model(batch).isfinite().all()
    assert model(batch).equal(before)


def test_they_are_built_from_plain_values():
    for described, model in (
        (Architecture.of(SetConfig(**SMALL), input_size=12, num_classes=3), of_sets()),
        (Architecture.of(HierarchicalConfig(**SMALL), vocab_size=12, num_classes=3, padding_id=0), of_documents()),
    ):
        built = Architecture.from_plain(described.to_plain()).build()
        shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (built, model)]
        assert shapes[0] == shapes[1]


def test_an_empty_document_is_refused():
    with pytest.raises(ValueError, match="at least one real token each"):
        of_documents()(torch.zeros(1, 2, 3, dtype=torch.long))
