"""What an accelerator changes, on one that is simulated: everything is on it, and a step waits for nothing that it could spare.

The simulation is installed in processes of their own, see `simulated_accelerator`.
"""

import gc
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from simulated_accelerator import DEVICE, install, simulated
from tameformer.probes import Watch, default_probes
from tameformer.probes.exact_attention_entropy import ExactAttentionEntropy
from tameformer.readings import Readings
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tameformer.stabilizers.sigma_optimizer import SigmaBesideOptimizer
from tameformer.stabilizers.sigma_reparam import Rows, sigma_reparam
from tiny_recipes import SETTINGS, values_of, write_data
from zoo import FAMILIES, main_output

ONCE = (
    "_accelerator.prepare_model(",
    "normalize(right",
    "torch.tensor(rows",
    "torch.tensor([places",
    "torch.tensor(factors",
    "self._statistics.to(",
)
"""Waits of the first steps: the model goes to the device, and what probes need there for good."""
AFTER_TRAINING = ("checkpoint.py", "recovery.py", "evaluate.py", "self._statistics.tolist(")
LOSSES = ("train/loss", "eval/loss")
RECURRENT = {"hierarchical", "seq2seq-rnn"}
"""Their GRU is one kernel of the device, which a simulation has not."""


def trained(recipe, values, resume="never", inject=""):
    """The last metrics of a run, and what waited for the device and how often."""
    torch.set_num_threads(1)
    with simulated() as waits:
        result = train(recipe, overrides=values, resume=resume, inject=inject)
    return result.metrics, dict(waits)


def exactly(model, optimizers):
    return [ExactAttentionEntropy()]


def watched(name, probes_of=default_probes):
    """What probes find in the second step of a family's model, and what waited for the device in it."""
    family = FAMILIES[name]
    with simulated() as waits:
        torch.manual_seed(0)
        model = family.model()
        device = DEVICE if torch.accelerator.is_available() else "cpu"
        model, inputs = tree_map_only((nn.Module, torch.Tensor), lambda one: one.to(device), (model, family.inputs()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        probes = [(probe, 1) for probe in probes_of(model, [optimizer])]
        watch = Watch(model, probes, optimizers=[optimizer])
        for _ in range(2):
            optimizer.zero_grad()
            waits.clear()  # the first step brings to the device what stays there
            with watch.watching(1):
                main_output(model(**inputs)).float().square().mean().backward()
                optimizer.step()
            readings = Readings(watch.read())
        return readings.values(), dict(waits)


def parametrized(model):
    sigma_reparam(model, split=in_parts)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def beside_optimizer(model):
    beside = SigmaBesideOptimizer(model, split=in_parts)
    optimizer = torch.optim.AdamW(beside.groups([{"params": list(model.parameters())}]), lr=1e-2)
    beside.follow(optimizer)
    return optimizer


def in_parts(name, module, parent):
    return {"0": Rows((4, 12)), "2": Rows((1, 2), groups=2)}.get(name)


def reparametrized(optimizer_of):
    """Losses with a learned spectral norm of two layers of one shape and two of others, and what waited in the last steps."""
    with simulated() as waits:
        torch.manual_seed(0)
        device = DEVICE if torch.accelerator.is_available() else "cpu"
        layers = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        model, data, losses = nn.Sequential(*layers).to(device), torch.linspace(-1, 1, 48).view(8, 6).to(device), []
        optimizer = optimizer_of(model)
        for step in range(6):
            if step == 2:
                waits.clear()
            loss = (model(data) - data).square().mean()
            loss.backward()
            optimizer.step()
            model.zero_grad()
            optimizer.zero_grad()
            losses.append(loss.detach())
        there = dict(waits)
    del model, optimizer
    gc.collect()  # while a reparametrized model is alive, a later run asks whether a step has been
    return torch.stack(losses).tolist(), there


def mixed():
    with simulated():
        return torch.ones(3, device="simulated") + torch.ones(3)


@pytest.fixture(scope="module")
def on_accelerator():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=install) as pool:
        yield lambda call, *values: pool.submit(call, *values).result()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def settings(recipe, data, run, **more):
    values = {"max_steps": 4, "precision": "fp32", "optim.warmup_steps": 1, "loop.eval_steps": 4}
    return {**values, **values_of(recipe, data), "output_dir": str(run), **more}


@pytest.mark.parametrize("recipe", sorted(set(SETTINGS) - RECURRENT))
def test_every_recipe_trains_there_as_on_a_processor(recipe, data, tmp_path, on_accelerator):
    there, waits = on_accelerator(trained, recipe, settings(recipe, data, tmp_path / "there"))
    here = train(recipe, overrides=settings(recipe, data, tmp_path / "here")).metrics
    for key in LOSSES:
        assert math.isclose(there[key], here[key], rel_tol=1e-5)
    assert any("prepare_model" in line for line in waits)  # it was there


@pytest.mark.parametrize("form", [parametrized, beside_optimizer])
def test_power_steps_and_gradients_of_sigma_reparam_wait_for_nothing(form, on_accelerator):
    there, waits = on_accelerator(reparametrized, form)
    here, _ = reparametrized(form)
    assert there == pytest.approx(here, rel=1e-5)
    assert here[-1] < here[0]
    assert not waits


def steady(waits):
    """Waits that are not for the start or the end of the run, by file."""
    kept = {line: count for line, count in waits.items() if not any(part in line for part in (*ONCE, *AFTER_TRAINING))}
    return {line.partition(":")[0]: count for line, count in kept.items()}


@pytest.mark.parametrize(
    "more",
    [
        {"optim.ema_decay": 0.9, "gradient_accumulation_steps": 2},
        {"optim.name": "sgd", "optim.clipping": "adaptive", "stabilize": ["layer_scale"]},
        {"precision": "bf16", "optim.clipping": "adaptive"},
    ],
)
def test_a_step_waits_only_for_the_numbers_of_the_one_before(more, data, tmp_path, on_accelerator):
    nothing = {f"probes.{field.name}": None for field in fields(ProbesConfig)}
    values = {**settings("char-lm", data, tmp_path / "run"), "max_steps": 12, "loop.eval_steps": 12, **nothing, **more}
    _, waits = on_accelerator(trained, "char-lm", values)
    # In the first step an optimizer has no state yet that a refused step could leave alone, so two numbers are read at once.
    assert steady(waits) == {"event at readings.py": 12, "number read at training/step.py": 2}


def test_watching_waits_in_no_step_but_the_watched(data, tmp_path, on_accelerator):
    every = {f"probes.{field.name}": 5 for field in fields(ProbesConfig)}
    values = {**settings("char-lm", data, tmp_path / "run"), "max_steps": 12, "loop.eval_steps": 12, **every}
    _, waits = on_accelerator(trained, "char-lm", values)
    # Steps 5, 10 and 12: who listens to an optimizer has to know whether it steps. Their values come one step later.
    assert steady(waits) == {"event at readings.py": 12 + 3, "number read at training/step.py": 2 * (1 + 3)}


def test_a_run_resumed_there_is_one_never_stopped(data, tmp_path, on_accelerator):
    more = {"optim.name": "muon", "optim.clipping": "adaptive", "optim.ema_decay": 0.9, "max_steps": 8}
    whole, _ = on_accelerator(trained, "char-lm", {**settings("char-lm", data, tmp_path / "whole"), **more})
    parts = {**settings("char-lm", data, tmp_path / "parts"), **more}
    on_accelerator(trained, "char-lm", {**parts, "loop.pause_after": 0.5})
    resumed, _ = on_accelerator(trained, "char-lm", parts, "auto")
    assert {key: whole[key] for key in LOSSES} == {key: resumed[key] for key in LOSSES}


def test_a_broken_step_is_refused_there(data, tmp_path, on_accelerator):
    values = {**settings("char-lm", data, tmp_path / "run"), "max_steps": 8, "loop.logging_steps": 1}
    metrics, _ = on_accelerator(trained, "char-lm", values, "never", "nan@5")
    assert [line["step"] for line in RunReader(tmp_path / "run").log() if line.get("train/skipped")] == [5]
    assert math.isfinite(metrics["train/loss"])
    assert math.isfinite(metrics["eval/loss"])


@pytest.mark.parametrize("name", [name for name in FAMILIES if "timm" not in name])
def test_probes_see_the_same_there_and_wait_for_nothing(name, on_accelerator):
    there, waits = on_accelerator(watched, name)
    here, _ = watched(name)
    assert there.keys() == here.keys()
    loose = [key for key in here if not math.isclose(here[key], there[key], rel_tol=2e-3, abs_tol=2e-3)]
    assert not loose
    # What else waits is the model's own doing: Hugging Face looks into its masks.
    ours = {
        line: count for line, count in waits.items() if "patch/forward_pass.py" not in line and "elsewhere" not in line
    }
    assert ours == {"event at readings.py: self._event.synchronize()": 1}


def test_exact_entropy_is_measured_where_there_is_no_fused_kernel_for_it(on_accelerator):
    there, _ = on_accelerator(watched, "decoder", exactly)
    here, _ = watched("decoder", exactly)
    assert there == pytest.approx(here, abs=1e-5)


def test_memory_that_runs_out_there_cuts_the_batch(data, tmp_path, on_accelerator):
    values = settings("char-lm", data, tmp_path / "run")
    whole, _ = on_accelerator(
        trained, "char-lm", {**values, "model.dropout": 0.0, "output_dir": str(tmp_path / "whole")}
    )
    parts, _ = on_accelerator(trained, "char-lm", {**values, "model.dropout": 0.0}, "never", "oom@3")
    assert parts["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-5)
    assert "out_of_memory" in {event["kind"] for event in RunReader(tmp_path / "run").events()}


def test_what_is_left_on_the_processor_is_found(on_accelerator):
    with pytest.raises(RuntimeError, match=r"expected all tensors on simulated, got \(3,\) on the processor"):
        on_accelerator(mixed)
