"""What an accelerator changes, on one that is simulated: everything is on it, and a step waits for nothing that it could spare.

The simulation is installed in processes of their own, see `simulated_accelerator`.
"""

import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context

import pytest
import torch

from simulated_accelerator import install, simulated
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.record import RunReader
from tiny_recipes import SETTINGS, values_of, write_data

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


def test_what_is_left_on_the_processor_is_found(on_accelerator):
    with pytest.raises(RuntimeError, match=r"expected all tensors on simulated, got \(3,\) on the processor"):
        on_accelerator(mixed)
