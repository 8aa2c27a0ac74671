"""Detectors on real runs: each of these has the trouble that it is told of, and a run in order is told of nothing."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tameformer as tame
from tameformer.data.sources import digits
from tameformer.health.detectors import ClipRate, DetectorsConfig
from tameformer.recipes import catalogue
from tameformer.record import RunReader
from tameformer.report.read import read_run
from tameformer.report.verdict import judge
from tameformer.training import CheckpointFolder, Engine, Listener, Loop, StopRequest

SMALL = {
    "model.dim": 16,
    "model.num_heads": 2,
    "data.batch_size": 96,
    "data.eval_batch_size": 1024,
    "detectors.data_wait": None,  # a neighbour's work is no trouble of these runs
    "checkpoint.every": 1000,
}


def run(folder: Path, **overrides) -> Path:
    values = {key.replace("__", "."): value for key, value in overrides.items()}
    return tame.train("vit-digits", overrides={**SMALL, **values, "output_dir": str(folder)}).folder


def warned(folder: Path) -> list[dict]:
    return [event for event in RunReader(folder).events() if event["kind"] == "verdict"]


def quantities(folder: Path) -> list[str]:
    return [event["quantity"] for event in warned(folder)]


def test_a_run_in_order_is_told_of_nothing(tmp_path):
    assert warned(run(tmp_path, max_steps=60, loop__logging_steps=5)) == []


@pytest.mark.slow
def test_the_default_run_is_told_of_nothing(tmp_path):
    folder = tame.train("vit-digits", overrides={"output_dir": str(tmp_path)}).folder
    assert warned(folder) == []


def test_a_large_epsilon_and_a_tiny_bound_are_seen(tmp_path):
    folder = run(
        tmp_path, max_steps=30, loop__logging_steps=1, optim__eps=0.1, optim__max_grad_norm=1e-3,
        probes__grad_rms_over_epsilon=5,
    )  # fmt: skip
    (event,) = warned(folder)
    assert (event["quantity"], event["since"], event["step"]) == ("grad_rms_over_epsilon", 5, 10)
    assert event["value"] < 1e-3
    assert "the update vanishes" in event["message"]
    detector = ClipRate(steps=20)
    found = [detector.observe(line["step"], line) for line in RunReader(folder).log()]
    assert [verdict.value for verdict in found if verdict is not None] == [1.0]
    shown = judge(read_run(folder))
    assert any(event["message"] in finding.text for finding in shown.findings)


def test_thirty_times_the_rate_collapses_entropy(tmp_path):
    folder = run(
        tmp_path, max_steps=100, loop__logging_steps=5, optim__peak_lr=6e-2, optim__schedule="constant",
        optim__warmup_steps=5, optim__max_grad_norm=None, guard__spike_threshold=None,
    )  # fmt: skip
    events = [event for event in warned(folder) if event["quantity"] == "attention_entropy"]
    assert events
    layer, heads = events[0]["places"][0]
    assert layer.startswith("stack.layers.")
    assert set(heads) <= {0, 1}
    assert events[0]["since"] <= events[0]["step"] <= 100


def test_fifty_images_are_over_fitted(tmp_path):
    folder = run(
        tmp_path, max_steps=240, loop__eval_steps=10, data__validation_fraction=0.965, data__batch_size=25,
        optim__peak_lr=5e-3, optim__weight_decay=0.0, model__dim=32,
    )  # fmt: skip
    events = [event for event in warned(folder) if event["quantity"] == "eval/loss"]
    assert len(events) == 1
    assert "over-fitting" in events[0]["message"]


def test_shuffled_labels_stall(tmp_path):
    for split in ("train", "test"):
        source = digits(split)
        order = np.random.default_rng(0).permutation(len(source))
        np.savez(tmp_path / f"{split}.npz", x=source.images, y=source.labels[order])
    folder = run(
        tmp_path / "run", max_steps=130, data__source="npz", data__path=str(tmp_path), optim__warmup_steps=10,
        optim__schedule="constant",
    )  # fmt: skip
    assert quantities(folder) == ["loss"]
    assert warned(folder)[0]["step"] == 110  # 10 of warm-up and 100 more


class Lines(Listener):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.lines: list[dict] = []

    def on_log(self, step, values):
        self.lines.append({"step": step, **values})


def test_the_wait_for_data_is_measured(tmp_path):
    recipe = catalogue.resolve("vit-digits", {**SMALL, "max_steps": 6, "loop.logging_steps": 3})
    built, told = recipe.build(recipe.config, tmp_path), Lines()

    def slow(**bounds):
        for number, batch in enumerate(built.batches(**bounds)):
            if number >= 3:
                time.sleep(1.0)
            yield batch

    with StopRequest() as stop:
        Loop(replace(built, batches=slow, evaluate=None), Engine(), CheckpointFolder(tmp_path), told, stop).train()
    quick, waiting = (line["perf/data_wait"] for line in told.lines)
    assert 0 <= quick < waiting <= 1
    line = told.lines[1]
    assert 3.0 <= waiting * 3 * line["perf/step_seconds"] < 4.0  # the seconds that were slept


class Interrupt(Listener):
    """Sends this process a SIGTERM when a step has been logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, step, values):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


TROUBLED = {
    **SMALL, "max_steps": 26, "loop.logging_steps": 1, "optim.eps": 0.1, "probes.grad_rms_over_epsilon": 5,
    "optim.clipping": "adaptive", "optim.max_grad_norm": None,
}  # fmt: skip


def test_an_interrupted_run_tells_what_a_straight_one_tells_and_clips_alike(tmp_path):
    straight = tame.train("vit-digits", overrides={**TROUBLED, "output_dir": str(tmp_path / "a")}).folder
    for step in (5, 9):
        tame.train(
            "vit-digits", overrides={**TROUBLED, "output_dir": str(tmp_path / "b")}, resume="auto",
            listeners=[Interrupt(step)],
        )  # fmt: skip
    cut = tame.train("vit-digits", overrides={**TROUBLED, "output_dir": str(tmp_path / "b")}, resume="auto").folder
    assert len(warned(straight)) == 1
    assert warned(cut) == warned(straight)
    lines = [[{key: value for key, value in line.items() if not key.startswith("perf/")} for line in RunReader(folder).log()]
             for folder in (straight, cut)]  # fmt: skip
    assert lines[0] == lines[1]
    assert "train/clip_limit/decay" in lines[0][-2]


def test_what_a_rollback_undoes_is_told_again_and_stands_once(tmp_path):
    folder = tame.train(
        "vit-digits", inject="nan@14-16",
        overrides={**TROUBLED, "output_dir": str(tmp_path), "checkpoint.every": 4, "guard.max_skips": 2,
                   "guard.healthy_steps": 9, "guard.window": 20, "guard.min_values": 8},
    ).folder  # fmt: skip
    kinds = [event["kind"] for event in RunReader(folder).events() if event["kind"] in ("verdict", "rollback")]
    assert kinds == ["verdict", "rollback", "verdict"]
    findings = [finding for finding in judge(read_run(folder)).findings if "epsilon" in finding.text]
    assert len(findings) == 1


def test_a_monitor_that_goes_on_replays_its_record(tmp_path):
    def train(monitor, first, last):
        for step in range(first, last + 1):
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss, clip_rate=1.0)
            if step % 4 == 0:
                monitor.evaluate(loss=float(step))

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e3)
    build = DetectorsConfig().build
    with tame.Monitor(model, optimizer, output_dir=tmp_path, every=3, logging_steps=2, detectors=build()) as monitor:
        train(monitor, 1, 12)
        state = monitor.detectors.state()
    with tame.Monitor(
        model, optimizer, output_dir=tmp_path, every=3, logging_steps=2, start_step=12, detectors=build()
    ) as monitor:
        assert monitor.detectors.state() == state
        train(monitor, 13, 24)
    assert quantities(tmp_path) == ["grad_rms_over_epsilon"]
