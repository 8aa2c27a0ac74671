"""Attention of every kind of ours is measured, or named as not seen."""

import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.models import (
    EncoderConfig,
    GraphConfig,
    HierarchicalConfig,
    RecurrentTranslationConfig,
    SetConfig,
    encoder,
    graph_classifier,
    hierarchical_classifier,
    recurrent_translation,
    set_classifier,
)
from tameformer.nn.attention import AdditiveScore
from tameformer.nn.pooling import AttentionPooling
from tameformer.patch import Observation
from tameformer.probes import AttentionEntropy, Watch, default_probes
from zoo import run_steps

TOKENS = torch.randint(1, 30, (3, 11), generator=torch.Generator().manual_seed(0))
SCORES = ("dot", "general", "additive", "concat", "gaussian")


def encoder_with(**settings):
    config = EncoderConfig(dim=16, num_heads=2, num_layers=1, positions="none", max_length=16, **settings)
    return encoder(config, vocab_size=30), TOKENS, "stack.layers.0.attention.branch"


def documents():
    model = hierarchical_classifier(HierarchicalConfig(dim=16), vocab_size=30, num_classes=2, padding_id=0)
    return model, TOKENS[:, None].expand(-1, 2, -1), "word_pooling"


def sets():
    config = SetConfig(dim=16, num_heads=2, elements="tokens", pooling="attention")
    return set_classifier(config, input_size=30, num_classes=2), TOKENS, "pooling"


KINDS = {
    **{score: lambda score=score: encoder_with(score=score) for score in SCORES},
    "windowed": lambda: encoder_with(attention="windowed", radius=2),
    "collaborative": lambda: encoder_with(attention="collaborative"),
    "linear": lambda: encoder_with(attention="linear"),
    "documents": documents,
    "sets": sets,
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_measured_or_named(kind):
    torch.manual_seed(0)
    model, tokens, layer = KINDS[kind]()
    plain = model(tokens)
    watch = Watch(model, [(probe, 1) for probe in default_probes(model)])
    with watch.watching(1):
        assert model(tokens).equal(plain)
    values = {key for key in watch.read() if key.startswith("diag/attention_entropy/")}
    named = [line for line in watch.unseen() if "no call of attention" in line]
    if kind == "linear":
        assert not values
        assert named == [f"{layer}: no call of attention was seen"]
    else:
        assert f"diag/attention_entropy/{layer}" in {
            key.removesuffix(".attend") for key in values
        }  # a score may have weights
        assert named == []


def graph():
    edges = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1], [1, 2, 3, 4, 5, 6, 0, 3, 5]])
    model = graph_classifier(GraphConfig(head_dim=3, num_heads=4), num_features=5, num_classes=3)
    return model, {"features": torch.randn(7, 5, generator=torch.Generator().manual_seed(0)), "edges": edges}


def translation():
    model = recurrent_translation(RecurrentTranslationConfig(dim=16), vocab_size=30, padding_id=0)
    return model, {"source": TOKENS, "target_in": TOKENS[:, :6]}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("build", [graph, translation])
def test_a_watched_run_is_the_same_run(build, autocast):
    def run(watched):
        torch.manual_seed(0)
        model, inputs = build()
        return run_steps(model, inputs, watched=watched, autocast=autocast)  # which checks that nothing is left

    watched = run(watched=True)
    assert watched.same_run(run(watched=False))
    assert watched.unseen == []
    for values in watched.readings.values():
        assert any(key.startswith("diag/attention_entropy/") for key in values)
        assert [key for key, value in values.items() if not value.isfinite().all()] == []


@pytest.mark.parametrize("leading", [(), (3,), (2, 2), (2, 2, 2)])
def test_attend_is_seen_whatever_axes_lead(leading):
    """With a score of one's own: one head where there is no axis of heads, the first axis a sequence."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.score = AdditiveScore(1, 4)

        def forward(self, query, key):
            return tame.attend(query, key, key, score=self.score)

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.mine = Mine()

        def forward(self, query, key):
            return self.mine(query, key)

    torch.manual_seed(0)
    model, query, key = Around(), torch.randn(*leading, 5, 4), torch.randn(*leading, 6, 4)
    probe = AttentionEntropy()
    with Observation(model, [probe], sequences=None).watching():
        model(query, key)
    weights = model.mine.score(query, key).double().softmax(-1)
    heads = weights if len(leading) > 1 else weights.unsqueeze(-3)
    entropy = torch.special.entr(heads.reshape(-1, *heads.shape[-3:])).sum(-1).mean((0, 2))
    found = probe.read()["diag/attention_entropy/mine"]
    torch.testing.assert_close(found.double(), entropy, rtol=0, atol=1e-5)


def test_a_pooled_batch_is_judged_by_more_than_its_first_sequence():
    pooling, x = AttentionPooling(8), torch.randn(40, 7, 8, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(pooling.score, generator=torch.Generator().manual_seed(1))
    model = nn.ModuleDict({"pooling": pooling})
    model.forward = lambda x: pooling(x, nn.Identity())
    probe = AttentionEntropy()
    with Observation(model, [probe]).watching():
        model(x)
    entropy = torch.special.entr((x[:32] @ pooling.score).double().softmax(-1)).sum(-1).mean()
    assert probe.read()["diag/attention_entropy/pooling"].item() == pytest.approx(entropy.item(), abs=1e-5)
