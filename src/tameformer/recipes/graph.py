"""Classes of the nodes of one graph, from a few labelled ones (Kipf and Welling 2016, arXiv:1609.02907; GATv2's layers)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import SequentialBatches, ShuffledBatches
from tameformer.data.graph import NodeSource, read_graph
from tameformer.models import Architecture
from tameformer.models.graph import GraphConfig
from tameformer.recipes.assemble import assemble, require_path
from tameformer.recipes.config import RecipeConfig
from tameformer.recipes.evaluation import class_sums, one_pass
from tameformer.training import Engine, Run
from tameformer.training.step import Batch


@dataclass(frozen=True, kw_only=True)
class GraphDataConfig:
    """A graph with labelled nodes."""

    path: str | None = None
    """A .npz archive with x, y, edge_index, train_index, valid_index, test_index."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """Training of a classifier of nodes; every step sees all training nodes."""

    data: GraphDataConfig = field(default_factory=GraphDataConfig)
    """The graph."""
    model: GraphConfig = field(default_factory=GraphConfig)
    """The classifier."""
    max_steps: int | None = 200
    """Optimizer steps; null trains for `num_train_epochs`."""


def build(config: Config, folder: Path) -> Run:
    """The run that the configuration describes: validation nodes are evaluated during it, test nodes once, at the end."""
    graph = read_graph(require_path(config.data.path, "a graph (a .npz archive)"))
    told = {"num_features": graph.features.shape[1], "num_classes": graph.num_classes}
    return assemble(
        config,
        folder=folder,
        model=Architecture("graph_classifier", config.model, told),
        source=NodeSource(graph, graph.train),
        plan=ShuffledBatches(len(graph.train), len(graph.train), seed=config.order_seed),
        loss=node_loss,
        unit="samples",
        evaluate=partial(evaluate, source=NodeSource(graph, graph.valid)),
        test=partial(evaluate, source=NodeSource(graph, graph.test)),
    )


def node_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the nodes that count."""
    logits = model(batch["features"], batch["edges"])[batch["nodes"]]
    return F.cross_entropy(logits, batch["labels"], reduction="sum")


def evaluate(engine: Engine, model: nn.Module, *, source: NodeSource) -> dict[str, float]:
    """Mean cross-entropy, and the share of nodes whose class was recognized."""
    plan = SequentialBatches(len(source), len(source))  # the graph is gone through once, whatever the number of nodes
    return one_pass(engine, model, source, plan, measure)


def measure(model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
    """Sums over the nodes that count."""
    return class_sums(model(batch["features"], batch["edges"])[batch["nodes"]], batch["labels"])
