"""Attention along edges is measured at every node, exactly, and measuring it changes nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tameformer as tame
from tameformer.models import GraphConfig, graph_classifier
from tameformer.nn.graph_attention import GraphAttention
from tameformer.patch import Observation
from tameformer.probes import AttentionEntropy, Watch, default_probes
from tameformer.probes.edge_entropy import edge_entropy, edge_statistics
from tameformer.probes.exact_attention_entropy import ExactAttentionEntropy
from tameformer.probes.head_output import HeadOutput

NAMES = ("attention_entropy", "attention_entropy_min", "attention_logit_max", "attention_entropy_max")


def by_loop(logits, groups, num_queries):
    """By name, of one head; and the entropy of each query: NaN without edges."""
    entropies, largest, sizes = [], [], []
    for query in range(num_queries):
        row = logits[groups == query].double()
        entropies.append(torch.special.entr(row.softmax(0)).sum().item() if len(row) else math.nan)
        if len(row):
            largest.append(row.max().item())
            sizes.append(math.log(len(row)))
    there = [value for value in entropies if not math.isnan(value)]
    values = (sum(there) / len(there), min(there), max(largest), sum(sizes) / len(sizes))
    return dict(zip(NAMES, values, strict=True)), entropies


@given(scale=st.floats(0.01, 300), seed=st.integers(0, 1000), num_edges=st.integers(1, 40))
def test_statistics_are_those_of_a_float64_loop_over_nodes(scale, seed, num_edges):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_edges, 2, generator=generator)
    groups = torch.randint(8, (num_edges,), generator=generator)
    found, entropies = edge_statistics(logits, groups, 8), edge_entropy(logits, groups, 8)
    for head in range(2):
        expected, each = by_loop(logits[:, head], groups, 8)
        for name in NAMES:
            value = found[name] if name.endswith("_max") and "entropy" in name else found[name][head]
            assert value.item() == pytest.approx(expected[name], rel=1e-5, abs=5e-5), name
        torch.testing.assert_close(
            entropies[:, head].double(), torch.tensor(each).double(), rtol=0, atol=5e-5, equal_nan=True
        )
    assert (found["attention_entropy_bound"] <= found["attention_entropy"] + 5e-5).all()
    assert not found["attention_entropy_error"].any()


def test_a_nan_stays_in_its_head_and_a_graph_without_edges_has_no_entropy():
    logits, groups = torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 1, 3])
    logits[2, 1] = math.nan
    found = edge_statistics(logits, groups, 4)
    assert found["attention_entropy"].isnan().tolist() == [False, True]
    assert found["attention_entropy_error"].isnan().tolist() == [False, True]
    empty = edge_statistics(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 4)
    assert all(value.isnan().all() for value in empty.values())


def test_a_watched_graph_is_the_same_graph_and_all_its_attention_is_seen():
    torch.manual_seed(0)
    model = graph_classifier(GraphConfig(head_dim=3, num_heads=4), num_features=5, num_classes=3).eval()
    features, edges = torch.randn(7, 5), torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1], [1, 2, 3, 4, 5, 6, 0, 3, 5]])
    plain = model(features, edges)
    seen = {}

    def look(module, args, output):
        x, all_edges = args
        source, target = (linear(x).view(len(x), 4, -1) for linear in (module.source, module.target))
        hidden = torch.nn.functional.leaky_relu(source[all_edges[0]] + target[all_edges[1]], 0.2)
        mixed = [
            (module.weights(x, all_edges)[..., None] * source[all_edges[0]])[all_edges[1] == n].sum(0) for n in range(7)
        ]
        seen[module] = (hidden * module.vector).sum(-1), all_edges[1], torch.stack(mixed)

    layers = {f"layers.{number}": layer for number, layer in enumerate(model.layers)}
    hooks = [layer.register_forward_hook(look) for layer in layers.values()]
    model(features, edges)
    for hook in hooks:
        hook.remove()
    probes = [AttentionEntropy(), ExactAttentionEntropy(), HeadOutput(positions=None)]
    for probe in probes:
        with Observation(model, [probe]).watching():
            assert model(features, edges).equal(plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    values, exact, heads = (probe.read() for probe in probes)
    assert {key.rpartition("/")[2] for key in values} == layers.keys() == {key.rpartition("/")[2] for key in heads}
    for name, layer in layers.items():
        logits, groups, mixed = seen[layer]
        for head in range(4):
            expected, _ = by_loop(logits[:, head].detach(), groups, 7)
            for found in (values, exact):
                got = found[f"diag/attention_entropy/{name}"][head].item()
                assert got == pytest.approx(expected["attention_entropy"], abs=2e-6)
        squares = (mixed - mixed.mean(0)).square().sum((0, 2))
        torch.testing.assert_close(heads[f"diag/head_output/{name}"], (squares / squares.mean()).sqrt().detach())
    watch = Watch(model, [(probe, 1) for probe in default_probes(model)], counts=lambda: True)
    with watch.watching(1):
        model(features, edges)
    assert not [line for line in watch.unseen() if "attention" in line]


def test_a_layer_of_anyones_is_seen():
    layer, edges = GraphAttention(5, 2, 2), torch.tensor([[0, 1, 2], [1, 2, 2]])

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.neighbours = layer

        def forward(self, x):
            return self.neighbours(x, edges)

    values = tame.diagnose(Mine(), torch.randn(3, 5)).values
    ceiling = (math.log(1) + math.log(2)) / 2  # node 0 has no edge to it
    entropy, share = (values[f"diag/attention_entropy{name}/neighbours/1"] for name in ("", "_share"))
    assert 0 < entropy < ceiling
    assert share == pytest.approx(entropy / ceiling)
