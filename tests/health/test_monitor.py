import copy
import logging
import math

import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.errors import RecordError
from tameformer.health import Monitor
from tameformer.probes import AttentionEntropy, Probe
from tameformer.record import RunReader


def model_and_optimizer(seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, monitor=None):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(2, 5, 16)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if monitor is not None:
            monitor.step(loss=loss)
    return losses, [p.detach().clone() for p in model.parameters()], torch.get_rng_state()


def left_on(model, optimizer):
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    return hooks or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks


def test_a_monitored_run_is_the_same_run_to_the_bit(tmp_path):
    plain = train(*model_and_optimizer(), 7)
    model, optimizer = model_and_optimizer()
    with Monitor(model, optimizer, output_dir=tmp_path / "run", every=2) as monitor:
        watched = train(model, optimizer, 7, monitor)
    assert [a.item() for a in plain[0]] == [b.item() for b in watched[0]]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], watched[1], strict=True))
    assert torch.equal(plain[2], watched[2])
    assert not left_on(model, optimizer)


def test_the_folder_is_a_run_folder(tmp_path):
    model, optimizer = model_and_optimizer()
    with Monitor(model, optimizer, output_dir=tmp_path / "run", every=2) as monitor:
        losses, *_ = train(model, optimizer, 5, monitor)
        monitor.evaluate(loss=0.5)
    reader = RunReader(tmp_path / "run")
    log = reader.log()
    assert [line["step"] for line in log] == [2, 4, 5]
    assert [line["train/loss"] for line in log[:2]] == [losses[1].item(), losses[3].item()]
    assert log[0]["train/lr"] == 1e-2
    assert log[0]["train/attention_entropy"] > 0
    assert log[2]["eval/loss"] == 0.5
    probes = reader.probes()
    assert [line["step"] for line in probes] == [2, 4]
    quantities = {key.split("/")[1] for key in probes[0] if key != "step"}
    assert {"attention_entropy", "branch_share", "update_ratio", "grad_norm", "spectral_norm"} <= quantities
    assert [event["kind"] for event in reader.events() if event["kind"] != "unseen"] == ["start", "finish"]


def test_each_probe_keeps_its_own_cadence(tmp_path):
    model, optimizer = model_and_optimizer()

    class Counter(Probe):
        def __init__(self, name):
            self.name, self.count = name, 0

        def on_begin(self):
            self.count += 1

        def read(self):
            return {f"diag/{self.name}/layer": torch.tensor(float(self.count))}

    probes = [(Counter("often"), 2), (Counter("seldom"), 3)]
    with Monitor(model, optimizer, output_dir=tmp_path / "run", probes=probes, logging_steps=5) as monitor:
        train(model, optimizer, 6, monitor)
    measured = [
        (line["step"], line.get("diag/often/layer"), line.get("diag/seldom/layer"))
        for line in RunReader(tmp_path / "run").probes()
    ]
    assert measured == [(2, 1, None), (3, None, 1), (4, 2, None), (6, 3, 2)]
    assert [line["step"] for line in RunReader(tmp_path / "run").log()] == [5]


def test_a_value_that_is_not_finite_is_written_as_such(tmp_path):
    model, optimizer = model_and_optimizer()
    with Monitor(model, optimizer, output_dir=tmp_path / "run", every=1) as monitor:
        train(model, optimizer, 1, monitor)
        with torch.no_grad():
            model[1].weight[0, 0] = math.nan
            model[0].layers[1].linear1.weight[0, 0] = math.inf
        train(model, optimizer, 1, monitor)
    log, probes = RunReader(tmp_path / "run").log(), RunReader(tmp_path / "run").probes()
    assert math.isnan(log[1]["train/loss"])
    assert math.isfinite(probes[1]["diag/attention_entropy/0.layers.0.self_attn/0"])
    assert not math.isfinite(probes[1]["diag/activation_rms/0.layers.1"])


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    model, optimizer = model_and_optimizer()
    Monitor(model, optimizer, output_dir=tmp_path).close()
    with pytest.raises(RecordError, match="holds a run already"):
        Monitor(model, optimizer, output_dir=tmp_path)
    assert not left_on(model, optimizer)


def test_a_resumed_run_tells_each_step_once(tmp_path):
    model, optimizer = model_and_optimizer()
    with Monitor(model, optimizer, output_dir=tmp_path, every=1) as monitor:
        train(model, optimizer, 4, monitor)
    with Monitor(model, optimizer, output_dir=tmp_path, every=1, start_step=2) as monitor:
        train(model, optimizer, 3, monitor)
    assert [line["step"] for line in RunReader(tmp_path).log()] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in RunReader(tmp_path).probes()] == [1, 2, 3, 4, 5]
    kinds = [event["kind"] for event in RunReader(tmp_path).events()]
    assert [kind for kind in kinds if kind != "unseen"] == ["start", "finish", "resume", "finish"]


def test_detach_leaves_nothing_behind(tmp_path):
    model, optimizer = model_and_optimizer()
    monitor = Monitor(model, optimizer, output_dir=tmp_path, every=1)
    assert left_on(model, optimizer)
    monitor.detach()
    assert not left_on(model, optimizer)
    monitor.close()


def test_an_exception_in_the_loop_leaves_nothing_behind_and_is_told(tmp_path):
    model, optimizer = model_and_optimizer()

    def loop():
        with Monitor(model, optimizer, output_dir=tmp_path, every=1) as monitor:
            train(model, optimizer, 2, monitor)
            model(torch.randn(2, 5, 16)).mean().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert not left_on(model, optimizer)
    assert RunReader(tmp_path).events()[-1]["message"] == "stopped after step 2: ZeroDivisionError"


def test_what_cannot_be_seen_is_said_once(tmp_path, caplog):
    class HandMadeAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):
            return (x @ self.project(x).mT).exp() @ x

    model = nn.Sequential(HandMadeAttention())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with (
        caplog.at_level(logging.WARNING),
        Monitor(model, optimizer, output_dir=tmp_path, probes=[(AttentionEntropy(), 1)]) as monitor,
    ):
        for _ in range(2):
            model(torch.randn(1, 3, 4)).mean().backward()
            optimizer.step()
            monitor.step()
    events = [event["message"] for event in RunReader(tmp_path).events() if event["kind"] == "unseen"]
    assert events == ["not measured: 0: no call of attention was seen"]
    assert caplog.messages == events


def test_trackers_are_told_each_line(tmp_path):
    model, optimizer = model_and_optimizer()
    told = []
    with Monitor(
        model, optimizer, output_dir=tmp_path, every=2, trackers=[lambda step, values: told.append((step, values))]
    ) as monitor:
        train(model, optimizer, 4, monitor)
        monitor.evaluate(accuracy=0.25)
    assert [step for step, _ in told] == [2, 4, 4]
    assert "train/loss" in told[0][1]
    assert told[-1][1] == {"eval/accuracy": 0.25}


@pytest.mark.compile
def test_unmonitored_steps_of_a_compiled_model_stay_compiled(tmp_path):
    from torch._dynamo.testing import CompileCounter

    model, optimizer = model_and_optimizer()
    counter = CompileCounter()
    compiled = torch.compile(copy.deepcopy(model).eval(), backend=counter)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-2)
    with Monitor(compiled, optimizer, output_dir=tmp_path, every=2) as monitor:
        for _ in range(6):
            loss = compiled(torch.randn(2, 5, 16)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(loss=loss)
    assert counter.frame_count == 1
    assert [line["step"] for line in RunReader(tmp_path).probes()] == [2, 4, 6]
    assert any("attention_entropy" in key for key in RunReader(tmp_path).probes()[0])


def test_the_public_names_are_there():
    assert tame.Monitor is Monitor
    assert tame.diagnose.__module__ == "tameformer.health.diagnose"
