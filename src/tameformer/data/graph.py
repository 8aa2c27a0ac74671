"""One graph with labelled nodes, some of which are learned from: read, checked, and given whole with every batch."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.sources.npz import opened, read_field
from tameformer.data.stream import Batch
from tameformer.errors import DataError

_SPLITS = ("train_index", "valid_index", "test_index")


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes with features and classes, and edges between them."""

    features: Tensor
    """float32 (nodes, features), each row divided by its sum."""
    edges: Tensor
    """int64 (2, edges), from the first row to the second, without self-loops and duplicates."""
    labels: Tensor
    """int64 (nodes,)."""
    train: np.ndarray
    """Nodes that are learned from, int64."""
    valid: np.ndarray
    """Nodes to choose settings by."""
    test: np.ndarray
    """Nodes that decide nothing."""

    @property
    def num_classes(self) -> int:
        """The largest label plus one."""
        return int(self.labels.max()) + 1


@dataclass(frozen=True, eq=False)
class NodeSource:
    """Some nodes of a graph as a source: a batch holds the whole graph, and which nodes count."""

    graph: Graph
    """The graph."""
    nodes: np.ndarray
    """The nodes that count, int64."""

    def __len__(self) -> int:
        return len(self.nodes)

    def fetch(self, keys: SampleKeys) -> Batch:
        """`features` and `edges` of the graph, `nodes` and their `labels`, and `num_items`, their number."""
        nodes = torch.from_numpy(self.nodes[keys.indices])
        graph = self.graph
        return {
            "features": graph.features,
            "edges": graph.edges,
            "nodes": nodes,
            "labels": graph.labels[nodes],
            "num_items": len(keys),
        }


def read_graph(path: str | Path) -> Graph:
    """A graph from an archive with `x`, `y`, `edge_index`, `train_index`, `valid_index` and `test_index`; nothing is unpickled.

    Self-loops and duplicate edges are dropped.

    Raises:
        DataError: the file, field or value that is wrong, and the remedy.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} is no file; give a .npz archive of a graph")
    with opened(file) as archive:
        missing = [name for name in ("x", "y", "edge_index", *_SPLITS) if name not in archive.files]
        if missing:
            raise DataError(f"{file} has no field {missing[0]!r}; it has {sorted(archive.files)}: add the field")
        arrays = {name: read_field(archive, name, file) for name in ("x", "y", "edge_index", *_SPLITS)}
    x, labels = arrays["x"], arrays["y"]
    if x.ndim != 2 or x.dtype.kind not in "fiu" or 0 in x.shape:
        raise DataError(f"{file}: x is {x.dtype} of shape {x.shape}; expected numbers of shape (nodes, features)")
    if not np.isfinite(x).all():
        node = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise DataError(f"{file}: x of node {node} holds values that are not finite; repair it")
    if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise DataError(f"{file}: y is {labels.dtype} of shape {labels.shape}; expected {len(x)} integers from 0")
    edges = arrays["edge_index"]
    if edges.ndim != 2 or len(edges) != 2 or edges.dtype.kind not in "iu":
        raise DataError(f"{file}: edge_index is {edges.dtype} of shape {edges.shape}; expected integers (2, edges)")
    for name in ("edge_index", *_SPLITS):
        wrong = (
            arrays[name][(arrays[name] < 0) | (arrays[name] >= len(x))] if arrays[name].dtype.kind in "iu" else [name]
        )
        if len(wrong) or not arrays[name].size:
            found = f"names node {wrong[0]}" if len(wrong) else "is empty"
            raise DataError(f"{file}: {name} {found}; expected numbers of the {len(x)} nodes")
    edges = np.unique(edges[:, edges[0] != edges[1]].astype(np.int64), axis=1)
    total = x.sum(axis=1, keepdims=True, dtype=np.float64)
    features = (x / np.where(total == 0, 1, total)).astype(np.float32)
    train, valid, test = (np.unique(arrays[name]).astype(np.int64) for name in _SPLITS)
    return Graph(
        torch.from_numpy(features),
        torch.from_numpy(edges),
        torch.from_numpy(labels.astype(np.int64)),
        train,
        valid,
        test,
    )
