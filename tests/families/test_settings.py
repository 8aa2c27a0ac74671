"""The same promises under autocast, checkpointing, accumulation, compilation, and with two processes."""

import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tameformer.probes import Watch, default_probes
from zoo import FAMILIES, main_output, run_steps

FROM_GRADIENTS = ("grad_norm", "grad_rms_over_epsilon", "update_ratio")


def quantity(key):
    return key.split("/")[1]


def forward_values(values):
    return {key: value for key, value in values.items() if quantity(key) not in FROM_GRADIENTS}


def read_once(model, inputs):
    watch = Watch(model, [(probe, 1) for probe in default_probes(model)])
    with watch.watching(1):
        model(**inputs)
    return watch.read()


@pytest.mark.parametrize(
    "name", ["torch-encoder-post", "decoder", "encoder-decoder", "bert-sdpa", "llama-eager", "t5-sdpa"]
)
def test_autocast(name):
    family = FAMILIES[name]
    runs = [
        run_steps(family.model(), family.inputs(), watched=watched, steps=2, autocast=True) for watched in (False, True)
    ]
    assert runs[0].same_run(runs[1])
    model = family.model().eval()
    precise = read_once(model, family.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = read_once(model, family.inputs())
    assert rounded.keys() == precise.keys()
    for key, value in precise.items():
        assert rounded[key].dtype == torch.float32, key
        if quantity(key) in ("spectral_norm", "stable_rank", "attention_entropy_max"):
            assert torch.equal(rounded[key], value), key  # nothing of these is computed by the model
        elif quantity(key) == "dead_units":  # in steps of a unit
            assert abs(rounded[key] - value) <= 2 / 32, key
        else:
            torch.testing.assert_close(rounded[key], value, rtol=0.05, atol=0.03, msg=lambda m, key=key: f"{key}: {m}")


CHECKPOINTED = ["bert-sdpa", "vit-eager", "gpt2-sdpa", "llama-sdpa", "t5-eager", "bart-sdpa", "whisper-eager"]
CHECKPOINTED += ["wav2vec2-sdpa"]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing(name, use_reentrant):
    family = FAMILIES[name]
    ordinary = run_steps(family.model(), family.inputs(), watched=True, steps=2)
    runs = []
    for watched in (False, True):
        model = family.model()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        runs.append(run_steps(model, family.inputs(), watched=watched, steps=2))
    assert runs[0].same_run(runs[1])
    assert runs[1].unseen == ordinary.unseen
    for step, values in runs[1].readings.items():
        reference = ordinary.readings[step]
        assert values.keys() == reference.keys()
        for key, value in values.items():
            # The gradients are summed in another order, and Adam makes much of the smallest ones.
            torch.testing.assert_close(
                value, reference[key], rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize("name", ["torch-decoder", "vision", "bart-eager"])
def test_accumulation_sees_the_first_micro_batch_and_the_whole_gradient(name):
    family = FAMILIES[name]
    runs = [run_steps(family.model(), family.inputs(), watched=watched, micro_batches=2) for watched in (False, True)]
    assert runs[0].same_run(runs[1])
    assert list(runs[1].readings) == [2, 4]

    model, first = family.model().eval(), family.inputs()
    second = {key: value.flip(0) if len(value) == 2 else value for key, value in first.items()}
    alone = read_once(model, first)
    optimizer = torch.optim.AdamW(model.parameters())
    watch = Watch(model, [(p, 1) for p in default_probes(model, [optimizer])], optimizers=[optimizer])
    with watch.watching(1):
        for inputs in (first, second):
            (main_output(model(**inputs))[:1].square().mean() / 2).backward()
        squares = {
            name: float(p.grad.double().square().sum()) for name, p in model.named_parameters() if p.grad is not None
        }
        optimizer.step()
    values = watch.read()
    for key, value in forward_values(values).items():
        assert torch.equal(value, alone[key]), key
    norms = {}
    for full, square in squares.items():
        owner = full.rpartition(".")[0] or full
        norms[owner] = norms.get(owner, 0.0) + square
    assert norms.keys() == {key.split("/", 2)[2] for key in values if quantity(key) == "grad_norm"}
    for owner, square in norms.items():
        assert values[f"diag/grad_norm/{owner}"].item() == pytest.approx(math.sqrt(square), rel=1e-5), owner


@pytest.mark.compile
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["torch-attention", "gpt2-sdpa"])
def test_compiled_models_stay_compiled(name, in_place):
    family = FAMILIES[name]
    compiled, ran = [], []

    def backend(graph, inputs):
        compiled.append(graph)

        def run(*args):
            ran.append(graph)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    runs = []
    for watched in (False, True):
        del compiled[:], ran[:]
        torch._dynamo.reset()
        model = family.model()
        if in_place:
            model.compile(backend=backend)
        else:
            model = torch.compile(model, backend=backend)
        runs.append((run_steps(model, family.inputs(), watched=watched, steps=5), len(compiled), len(ran)))
    (plain, graphs, calls), (seen, graphs_watched, calls_watched) = runs
    assert plain.same_run(seen)
    assert graphs_watched == graphs > 0  # nothing was compiled again after a watched step
    assert calls == 5 * calls_watched / 3  # steps 1, 3 and 5 ran compiled, the watched 2 and 4 did not
    ordinary = run_steps(family.model(), family.inputs(), watched=True, steps=5)
    assert seen.unseen == ordinary.unseen
    for step, values in seen.readings.items():
        assert values.keys() == ordinary.readings[step].keys()
        for key, value in values.items():
            torch.testing.assert_close(value, ordinary.readings[step][key], rtol=1e-4, atol=1e-5)


DISTRIBUTED = ["torch-encoder-post", "decoder", "gpt2-sdpa"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What the watching one of two processes found, by family and kind of wrapper."""
    folder = tmp_path_factory.mktemp("two")
    program = Path(__file__).with_name("two_processes.py")
    with contextlib.ExitStack() as stop:
        processes = []
        for rank in range(2):
            command = [sys.executable, str(program), str(rank), str(folder), *DISTRIBUTED]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            stop.callback(process.kill)
            processes.append(process)
        for process in processes:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    return lambda name, kind: [json.loads((folder / f"{name}-{kind}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", DISTRIBUTED)
def test_two_processes(two_processes, name, kind):
    watching, other = two_processes(name, kind)
    assert watching["same"]
    assert other["same"]
    layers = [key.split("/", 2)[2] for key in watching["narrow"] if key.startswith("diag/attention_entropy/")]
    assert layers == list(FAMILIES[name].attention_layers())
    values, single = watching["values"], watching["single"]
    untold = set(single) - set(values)
    unseen = [line.split(":")[0] for line in watching["unseen"]]
    assert set(values) <= set(single)  # names are those of the model without its wrapper
    if kind == "ddp":
        assert not untold
        assert tuple(unseen) == FAMILIES[name].unseen
    else:
        assert {quantity(key) for key in untold} == {
            "spectral_norm",
            "stable_rank",
            "grad_norm",
            "grad_rms_over_epsilon",
        }
        for key in untold:  # a quantity of a module is missing only where its weights are named
            layer = key.split("/", 2)[2]
            assert any(each.startswith(layer) for each in unseen), key
    for key, value in values.items():
        if kind == "fsdp" and quantity(key) == "update_ratio":
            assert 0 < value < 1, key  # of this process's part
        else:
            assert value == pytest.approx(
                single[key], rel=2e-3 if quantity(key) == "update_ratio" else 1e-4, abs=1e-5
            ), key
