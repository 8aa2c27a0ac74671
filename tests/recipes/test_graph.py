"""A graph is learned from a few labelled nodes, resumed to the bit, exported; and what is no graph is refused by field."""

import json
import os
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.cli.__main__ import main
from tameformer.data.graph import read_graph
from tameformer.errors import ConfigError, DataError
from tameformer.recipes.config import ProbesConfig
from tameformer.training import CheckpointFolder, Listener


def arrays():
    """Two groups whose nodes know each other; a label is hardly visible in a node, and clear among its neighbours."""
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    x = (generator.random((60, 12)) < 0.2 + 0.25 * (np.arange(12)[None] % 2 == labels[:, None])).astype(np.uint8)
    pairs = [
        (i, j) for i in range(60) for j in range(60) if i == j or (labels[i] == labels[j] and generator.random() < 0.2)
    ]
    edges = np.array(pairs, dtype=np.int32).T
    order = generator.permutation(60)
    return {"x": x, "y": labels, "edge_index": edges, "train_index": order[:10], "valid_index": order[10:30],
            "test_index": order[30:]}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "graph.npz"
    np.savez(path, **arrays())
    return path


def settings(file, folder, **changes):
    small = {"max_steps": 40, "model.dropout": 0.1, "model.attention_dropout": 0.1, "optim.weight_decay": 0.0}
    rare = {
        "loop.eval_steps": 20,
        "loop.logging_steps": 10,
        **{f"probes.{one.name}": None for one in fields(ProbesConfig)},
    }
    return {**small, **rare, "data.path": str(file), "output_dir": str(folder), **changes}


class Stop(Listener):
    def on_log(self, step, values):
        if step == 30:
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_learns_resumes_and_is_exported(file, tmp_path, capsys):
    result = tame.train("graph", overrides=settings(file, tmp_path / "run"))
    assert result.metrics["test/accuracy"] > 0.85
    cut = settings(file, tmp_path / "cut")
    assert tame.train("graph", overrides=cut, listeners=[Stop()]).exit_code == 143
    tame.train("graph", overrides=cut, resume="auto")
    manifests = [
        json.loads((CheckpointFolder(tmp_path / name).path(40) / "manifest.json").read_text())
        for name in ("run", "cut")
    ]
    assert manifests[0]["files"] == manifests[1]["files"]

    tame.export(tmp_path / "run", tmp_path / "out")
    graph = read_graph(file)
    model = tame.load(tmp_path / "out")
    found = model(graph.features, graph.edges).argmax(-1) == graph.labels
    assert found[graph.test].double().mean().item() == pytest.approx(result.metrics["test/accuracy"])
    assert main(["diagnose", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "Attention heads" in told
    assert "no call of attention" not in told


def test_a_stabilizer_works_on_it(file, tmp_path):
    values = settings(file, tmp_path, stabilize=["sigma_reparam"], max_steps=2)
    assert np.isfinite(tame.train("graph", overrides=values).metrics["eval/loss"])


def test_a_graph_is_read_without_loops_and_duplicates(tmp_path):
    given = arrays()
    given["edge_index"] = np.concatenate([given["edge_index"], given["edge_index"][:, :7]], axis=1)
    np.savez(tmp_path / "graph.npz", **given)
    graph = read_graph(tmp_path / "graph.npz")
    kept = {tuple(pair) for pair in arrays()["edge_index"].T.tolist() if pair[0] != pair[1]}
    assert {tuple(pair) for pair in graph.edges.T.tolist()} == kept
    assert graph.edges.shape[1] == len(kept)
    torch.testing.assert_close(graph.features.sum(1), torch.ones(60))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("y", None, r"has no field 'y'; it has"),
        ("y", np.zeros(3, dtype=np.int64), r"y is int64 of shape \(3,\); expected 60 integers from 0"),
        ("x", np.full((60, 2), np.nan), "x of node 0 holds values that are not finite"),
        (
            "edge_index",
            np.zeros((3, 4), dtype=np.int64),
            r"edge_index is int64 of shape \(3, 4\); expected integers \(2, edges\)",
        ),
        ("edge_index", np.array([[0], [60]]), "edge_index names node 60; expected numbers of the 60 nodes"),
        ("test_index", np.zeros(0, dtype=np.int64), "test_index is empty"),
        ("train_index", np.array([-1]), "train_index names node -1"),
    ],
)
def test_what_is_no_graph_is_refused(field, value, message, tmp_path):
    given = {name: array for name, array in {**arrays(), field: value}.items() if array is not None}
    np.savez(tmp_path / "graph.npz", **given)
    with pytest.raises(DataError, match=message):
        read_graph(tmp_path / "graph.npz")


def test_without_a_file_the_recipe_says_what_it_needs(tmp_path):
    with pytest.raises(ConfigError, match=r"this recipe needs a graph \(a \.npz archive\): give --data\.path PATH"):
        tame.train("graph", overrides={"output_dir": str(tmp_path)})
    with pytest.raises(DataError, match="is no file"):
        read_graph(tmp_path / "nothing.npz")
