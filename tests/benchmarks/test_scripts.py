import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tameformer.recipes.launch import train
from tiny_recipes import values_of, write_data

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = [
    "loop_overhead",
    "precision",
    "memory",
    "startup",
    "gpu_lm",
    "profile_step",
    "probes",
    "stabilizers",
    "entropy_cost",
    "entropy_sampling",
    "complexity",
    "guard",
    "finetune",
    "finetune_table",
    "scaling",
]


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("measure")


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_runs_on_toy_sizes_and_writes_both_files(name, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    arguments = ["--quick", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    importlib.import_module(name).main(arguments)
    content = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {"versions", "hardware", "threads", "started", "shell", "load"} <= content["machine"].keys()
    assert all(len(row) == len(table["head"]) for table in content["tables"] for row in table["rows"])
    assert content["raw"]
    shown = (tmp_path / f"{name}.md").read_text(encoding="utf-8")
    assert shown.startswith(f"# {name}\n")
    assert f"Command: `python benchmarks/{name}.py --quick" in shown


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_an_example_in_its_help(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert f"benchmarks/{name}.py" in source.partition("options = parser(")[2].partition(")")[0]


def test_quartiles_are_those_of_numpy(measure):
    values = np.random.default_rng(0).normal(size=23).tolist()
    found = measure.quartiles(values)
    assert (found.low, found.median, found.high) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]).tolist())


def test_turns_are_of_equal_length_and_every_step_lies_in_one(measure):
    steps = {"a": [], "b": []}
    turn = {"number": 0}

    def loop_of(name):
        def loop(step_begins):
            while step_begins():
                steps[name].append(turn["number"])

        return loop

    def around(name):
        def before():
            turn["number"] += 1

        return before, lambda: None

    loops = {name: loop_of(name) for name in steps}
    timings = measure.interleaved(loops, rounds=6, steps=5, warmup=3, around=around)
    assert {len(pairs) for pairs in timings.values()} == {6}
    for name in steps:
        assert steps[name][:3] == [0, 0, 0]
        by_turn = [steps[name].count(number) for number in dict.fromkeys(steps[name][3:])]
        assert by_turn == [5] * 6
    assert not set(steps["a"][3:]) & set(steps["b"][3:])


def test_ratio_is_taken_within_the_round(measure):
    seconds = {"ours": [1.1, 11.0, 2.2], "bare": [1.0, 10.0, 2.0]}
    assert measure.ratio(seconds, "ours", "bare").high == pytest.approx(1.1)
    assert measure.difference_ms(seconds, "ours", "bare").low == pytest.approx(150.0)


def test_error_of_a_loop_reaches_the_caller(measure):
    def loop(step_begins):
        step_begins()
        step_begins()
        raise ValueError("broken at its second step")

    with pytest.raises(ValueError, match="second step"):
        measure.interleaved({"broken": loop}, rounds=1, steps=5, warmup=1)


def test_both_loops_of_a_comparison_learn_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    measure, subjects = importlib.import_module("measure"), importlib.import_module("subjects")
    size = subjects.TINY
    text = subjects.text_of(size, 5_000)
    bare_losses, our_losses = [], []
    loops = {
        "bare": subjects.bare(size, text, batches=subjects.same_windows, losses=bare_losses),
        "ours": subjects.ours(size, text, losses=our_losses),
    }
    measure.interleaved(loops, rounds=1, steps=20, warmup=20)
    means = [sum(bare_losses[first : first + 10]) / 10 for first in range(0, 40, 10)]
    assert our_losses == pytest.approx(means, abs=1e-5)


def test_heads_that_are_turned_off_cost_what_the_evaluation_says(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    write_data(tmp_path)
    values = {**values_of("translation", tmp_path), "model.num_encoder_layers": 2, "decoding.eval_sentences": None}
    more = {
        "max_steps": 20,
        "optim.warmup_steps": 1,
        "optim.ema_decay": None,
        "precision": "fp32",
        "loop.eval_steps": 20,
    }
    found = train("translation", overrides={**values, **more, "output_dir": str(tmp_path / "run")})
    importlib.import_module("head_pruning").main([str(tmp_path / "run"), "--batches", "2"])
    first, _, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first == f"loss with all heads: {found.metrics['eval/loss']:.4g}"
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [
        "encoder.layers.*.attention.branch (4)",
        "decoder.layers.*.attention.branch (2)",
        "decoder.layers.*.cross_attention.branch (2)",
        "all (8)",
    ]
    assert len({row.split("|")[5] for row in rows}) == 4  # each kind costs something of its own
