"""A classifier of the nodes of a graph (Velickovic et al. 2018, "GAT", arXiv:1710.10903, section 3.3, with GATv2's layers)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.models.stack import check_choices, check_probabilities
from tameformer.nn.graph_attention import Edges, GraphAttention, Nodes
from tameformer.shapes import Float


@dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """A classifier of nodes."""

    architecture: Literal["gatv2"] = "gatv2"
    """Which architecture this is."""
    head_dim: int = 8
    """Width of a head in all layers but the last, in features."""
    num_heads: int = 8
    """Attention heads of a layer."""
    num_layers: int = 2
    """Layers: how many edges away a node can see."""
    dropout: float = 0.6
    """Probability of dropping a feature in front of a layer."""
    attention_dropout: float = 0.6
    """Probability of dropping the weight of an edge."""

    def __post_init__(self):
        check_choices(self)
        check_probabilities(self, "dropout", "attention_dropout")


class GraphClassifier(nn.Module):
    """Logits of the classes of every node; built by `graph_classifier`."""

    def __init__(self, layers: list[GraphAttention], dropout: float):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = dropout

    def forward(self, features: Nodes, edges: Edges) -> Float[Tensor, "nodes classes"]:
        """The logits; `edges` have no self-loops, which are added here, so that every node sees itself."""
        own = torch.arange(len(features), device=edges.device)
        edges = torch.cat([edges, torch.stack([own, own])], dim=1)
        x = features
        for number, layer in enumerate(self.layers):
            x = layer(F.dropout(x if number == 0 else F.elu(x), self.dropout, self.training), edges)
        return x


def graph_classifier(config: GraphConfig, *, num_features: int, num_classes: int) -> GraphClassifier:
    """A classifier with fresh weights, the same for the same `torch.manual_seed`; the last layer's heads are averaged.

    Example:
        >>> model = graph_classifier(GraphConfig(), num_features=5, num_classes=3)
        >>> model(torch.zeros(4, 5), torch.tensor([[0, 1], [1, 2]])).shape
        torch.Size([4, 3])
    """
    wide = config.head_dim * config.num_heads
    widths = [num_features, *[wide] * (config.num_layers - 1)]
    layers = [
        GraphAttention(
            width,
            num_classes if number == config.num_layers else config.head_dim,
            config.num_heads,
            mean=number == config.num_layers,
            dropout=config.attention_dropout,
        )
        for number, width in enumerate(widths, start=1)
    ]
    return GraphClassifier(layers, config.dropout)
