import importlib.util
import json
import math
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from tameformer.integrations import trackers
from tameformer.integrations.trackers import tracker

LINES = [(1, {"train/loss": 0.5, "train/attention_entropy": 1.5}), (2, {"train/loss": math.nan, "train/lr": math.inf})]


def send(tell):
    for step, values in LINES:
        tell(step, values)
    tell(2, {"eval/loss": -math.inf})  # an evaluation after a logged step
    tell.close()
    tell.close()


def need(package):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it is the extra {package}")


def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send(tracker("tensorboard", "run", logging_dir=tmp_path))
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    told = {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert told["train/attention_entropy"] == [(1, 1.5)]
    assert told["train/loss"][0] == (1, 0.5)
    assert math.isnan(told["train/loss"][1][1])
    assert told["train/lr"] == [(2, math.inf)]
    assert told["eval/loss"] == [(2, -math.inf)]


@pytest.mark.filterwarnings("ignore")  # not ours
def test_wandb_gets_every_number(tmp_path, monkeypatch):
    need("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
    tell = tracker("wandb", "project", mode="offline", dir=str(tmp_path), settings=settings)
    assert not (tmp_path / "wandb").exists()  # nothing starts before the first line
    send(tell)
    wandb.teardown()
    (record,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    text = record.read_bytes()
    for word in (
        b"train/loss",
        b"train/attention_entropy",
        b"train/lr",
        b"eval/loss",
        b"NaN",
        b"Infinity",
        b"-Infinity",
    ):
        assert word in text


def test_trackio_gets_every_number_at_its_step(tmp_path):
    need("trackio")
    code = f"""
from math import inf, nan
from tameformer.integrations.trackers import tracker
tell = tracker("trackio", "project", name="run")
for step, values in {LINES!r}:
    tell(step, values)
tell.close()
"""
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path)}  # read when trackio is imported
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    with closing(sqlite3.connect(tmp_path / "project.db")) as store:
        rows = store.execute("select step, metrics from metrics order by step").fetchall()
    assert [(step, json.loads(metrics)) for step, metrics in rows] == [
        LINES[0],
        (2, {"train/loss": "NaN", "train/lr": "Infinity"}),
    ]


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape('pip install "tameformer[mlflow]"')):
        tracker("mlflow")
