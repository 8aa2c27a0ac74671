"""Attention along edges is attention with a mask, is torch-geometric's, and sees a graph, not an order."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tameformer.models import GraphConfig, graph_classifier
from tameformer.nn.attention import attend
from tameformer.nn.attention.scores import concat_score
from tameformer.nn.graph_attention import GraphAttention
from tameformer.segments import segment_softmax

EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 3, 1, 2], [1, 0, 1, 1, 2, 2, 2, 4, 4]])  # nothing comes to node 3


def layer(*, mean, **changes):
    torch.manual_seed(0)
    made = GraphAttention(6, 4, 3, mean=mean, **changes).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def nodes():
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mean", [False, True])
def test_it_is_masked_attention_with_the_concat_score(mean):
    """The scores live beside ours: one head at a time, all pairs, a mask of the edges."""
    made, x = layer(mean=mean), nodes()
    source, target = made.source(x).view(5, 3, 4), made.target(x).view(5, 3, 4)
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[EDGES[1], EDGES[0]] = True
    heads = []
    for head in range(3):
        score = concat_score(1, 4, hidden_dim=4).double()
        with torch.no_grad():
            score.query_weight[0], score.key_weight[0] = torch.eye(4), torch.eye(4)
            score.vector[0] = made.vector[head]
        heads.append(attend(target[:, head], source[:, head], source[:, head], score=score, mask=mask))
    mixed = torch.stack(heads, 1)
    expected = (mixed.mean(1) if mean else mixed.flatten(1)) + made.bias
    torch.testing.assert_close(made(x, EDGES), expected)
    torch.testing.assert_close(made(x, EDGES)[3], made.bias)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_torch_geometrics(mean):
    geometric = pytest.importorskip(
        "torch_geometric.nn", reason='the peer is not installed: pip install "tameformer[graph]"'
    )
    made, x = layer(mean=mean), nodes().requires_grad_()
    peer = geometric.GATv2Conv(6, 4, heads=3, concat=not mean, add_self_loops=False).double()
    with torch.no_grad():
        for linear, ours in ((peer.lin_l, made.source), (peer.lin_r, made.target)):
            linear.weight.copy_(ours.weight)
            linear.bias.copy_(ours.bias)
        peer.att.copy_(made.vector[None])
        peer.bias.copy_(made.bias)
    outputs = [made(x, EDGES), peer(x, EDGES)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(one.square().sum(), x)[0] for one in outputs))


@given(st.integers(0, 1000))
def test_the_order_of_nodes_and_edges_means_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    made, x = layer(mean=True), nodes()
    order, edge_order = torch.randperm(5, generator=generator), torch.randperm(9, generator=generator)
    renamed = torch.empty(5, dtype=torch.long).scatter(0, order, torch.arange(5))
    moved = made(x[order], renamed[EDGES][:, edge_order])
    torch.testing.assert_close(moved, made(x, EDGES)[order])


def test_weights_of_a_node_add_up_to_one_whatever_the_size_of_the_logits():
    logits = torch.tensor([[1e4], [1e4], [-1e4], [3.0]], dtype=torch.float64, requires_grad=True)
    segments = torch.tensor([0, 0, 0, 2])
    weights = segment_softmax(logits, segments, 4)
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.5, 0.5, 0, 1], dtype=torch.float64))
    small = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: segment_softmax(one, segments, 4), (small,))
    dense = F.softmax(small[:3], dim=0)
    torch.testing.assert_close(segment_softmax(small, segments, 4)[:3], dense)


def test_a_node_sees_as_many_edges_away_as_there_are_layers_and_itself():
    chain = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    model = graph_classifier(GraphConfig(num_layers=2), num_features=6, num_classes=3).double().eval()
    x = nodes().requires_grad_()
    (grad,) = torch.autograd.grad(model(x, chain)[4].sum(), x)
    assert [bool(row.any()) for row in grad] == [False, False, True, True, True]
