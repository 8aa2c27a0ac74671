"""Remedies for fine-tuning on little data, side by side: nine ways on four tasks of GLUE, several seeds each.

Each run has a folder of its own, so that the script goes on where it was ended; one process trains them all, since starting
one takes seconds. They start from an encoder that `tame train masked-lm` has trained. The value of a run is that of its last
weights: nothing is chosen by the texts that judge.
"""

import gzip
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from write_up import Table, parser, set_threads, write

from tameformer.errors import DivergedError
from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.record import RunReader

TASKS = {
    "RTE": ("rte/train.jsonl.gz", "rte/validation.jsonl.gz", "eval/accuracy"),
    "MRPC": ("mrpc/train.jsonl.gz", None, "eval/f1"),
    "CoLA": ("cola/train.jsonl.gz", "cola/validation_in_domain.jsonl.gz", "eval/matthews"),
    "SST-2": ("sst2/train.jsonl.gz", "sst2/validation.jsonl.gz", "eval/accuracy"),
}
"""Files to learn from and to be judged by (null: the last tenth of the first), and the metric."""
BEFORE = {"RTE": "MRPC", "MRPC": "RTE", "CoLA": "SST-2", "SST-2": "CoLA"}
"""The intermediate task of each: of the four, the one most like it."""
EPOCHS = 3
BASE = {
    "model.positions": "rotary",
    "num_train_epochs": EPOCHS,
    "evals_per_epoch": None,
    "loop.eval_steps": 1_000_000,  # at the end only, where it is the result
    "precision": "fp32",
    "checkpoint.best_metric": None,
    **{f"probes.{field.name}": None for field in fields(ProbesConfig)},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "standard": {},
    "intermediate task": {"init_from": "..."},
    "layer-wise decay of the rate, 0.8": {"finetune.layer_decay": 0.8},
    "Mixout 0.5, no dropout": {"finetune.mixout": 0.5, "model.dropout": 0.0},
    "decay to the pretrained, 50": {"finetune.prior_decay": 50.0},
    "weight decay 10": {"optim.weight_decay": 10.0},
    "top layer re-initialized": {"finetune.reinit_layers": 1},
    "three times as long": {"num_train_epochs": 3 * EPOCHS},
    "not pre-trained": {"init_from": None},
}


def notes(texts: int) -> list[str]:
    """What the table does not say, `texts` being learned by each run."""
    return [
        f"{texts:,} training texts, others for each seed, {EPOCHS} epochs in batches of 16, Adam with its bias correction, "
        "rate 2e-4, weight decay 0.01, warm-up over a tenth, linear decay, dropout 0.1. Neither that nor a strength of a way "
        "was tuned.",
        "F1 for MRPC (judged by the last tenth of its training texts), Matthews' correlation for CoLA (in domain), accuracy "
        "for the others; +- is the standard deviation over the seeds.",
        f"Intermediate task: {2 * texts:,} texts, three epochs, of MRPC for RTE and back, of SST-2 for CoLA and back.",
        f"Over a run, decay to the pretrained takes back {_taken(texts, 50.0):.0%} of the distance to it, weight decay 10 "
        f"{_taken(texts, 10.0):.0%} of the weights.",
        "Not pre-trained: the same from fresh weights, with a tokenizer trained on the training texts.",
    ]


def _taken(texts: int, decay: float) -> float:
    """By all steps together, whose rate is on average half the peak."""
    return 1 - math.exp(-EPOCHS * math.ceil(texts / 16) * 1e-4 * decay)


def texts_of(task: str, data: Path) -> dict[str, Any]:
    """The keys that say what is learned."""
    learn, judge, _ = TASKS[task]
    return {"data.path": str(data / learn), "data.validation_path": None if judge is None else str(data / judge)}


def intermediate(task: str, data: Path, folder: Path, base: Mapping[str, Any]) -> Path:
    """The run that learned the task that comes before this one, trained now if it has not been."""
    run = folder / f"before-{task}"
    values = {**base, **texts_of(BEFORE[task], data)}
    if values["data.train_samples"] is not None:
        values["data.train_samples"] *= 2
    one(run, values, TASKS[task][2])
    return run


def measure(
    tasks: Sequence[str], ways: Sequence[str], seeds: int, data: Path, folder: Path, base: Mapping[str, Any]
) -> dict[str, dict[str, list[float | None]]]:
    """By way and task, a value a seed, None for one that diverged; a part of the work is a table of fewer ways."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for way in ways:
        for task in tasks:
            metric = TASKS[task][2]
            values = {**base, **texts_of(task, data), **WAYS[way]}
            if values.get("init_from") == "...":
                values["init_from"] = str(intermediate(task, data, folder, base))
            place, began = folder / f"{task}, {way}".replace(" ", "_").replace(",", ""), time.process_time()
            scores = [one(place / f"seed-{seed}", {**values, "seed": seed}, metric) for seed in range(seeds)]
            found.setdefault(way, {})[task] = scores
            print(f"{way}, {task}: {_show(scores)}, {time.process_time() - began:.0f} processor s", flush=True)
    return found


def one(run: Path, values: Mapping[str, Any], metric: str) -> float | None:
    """The last value of the metric; a run that has finished answers at once."""
    try:
        result = train("text-classification", overrides={**values, "output_dir": str(run)}, resume="auto")
    except DivergedError:
        return None
    if not result.finished:
        raise SystemExit(result.exit_code)  # Ctrl-C: the same command goes on
    return [line[metric] for line in RunReader(run).log() if metric in line][-1]


def _show(scores: Sequence[float | None]) -> str:
    values = [value for value in scores if value is not None]
    lost = "" if len(values) == len(scores) else f" ({len(scores) - len(values)} diverged)"
    if not values:
        return f"-{lost}"
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))
    return f"{100 * mean:.1f} +- {100 * deviation:.1f}{lost}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(
        __doc__, "python benchmarks/finetune_table.py --data DATA --pretrained runs/masked-lm --runs runs/table"
    )
    options.add_argument("--data", type=Path, help="folder with rte, mrpc, cola and sst2")
    options.add_argument("--pretrained", type=Path, help="run of masked-lm")
    options.add_argument("--runs", type=Path, help="where the runs go, and go on")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument(
        "--texts", type=int, default=500, help="each run learns from; twice as many are needed of the intermediate task"
    )
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    given = options.parse_args(arguments)
    set_threads(given.threads)
    if given.quick:
        with tempfile.TemporaryDirectory() as name:
            found, tasks = _toy(Path(name)), ["RTE"]
    elif None in (given.data, given.pretrained, given.runs):
        options.error("--data, --pretrained and --runs are needed")
    else:
        base = {**BASE, "init_from": str(given.pretrained), "data.train_samples": given.texts}
        tasks = given.tasks
        found = measure(tasks, list(WAYS), given.seeds, given.data, given.runs, base)
    rows = [[way, *(_show(values[task]) for task in tasks)] for way, values in found.items()]
    table = Table("Per cent, mean +- standard deviation", ["", *tasks], rows)
    about = "Ways to fine-tune a small encoder, 4 layers of dim 128, that was pre-trained for minutes: see the notes for sizes."
    write("finetune_table", [table], about=about, notes=notes(given.texts), raw=found, options=given)


def _toy(folder: Path) -> dict[str, dict[str, list[float | None]]]:
    """Two ways on texts made here."""
    (folder / "rte").mkdir()
    rows = [
        {"sentence1": "a warm day", "sentence2": ("a cold day", "it is warm")[n % 2], "label": n % 2} for n in range(24)
    ]
    for name in TASKS["RTE"][:2]:
        (folder / str(name)).write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    small = {"dim": 8, "num_layers": 2, "num_heads": 2}
    base = {
        **BASE,
        **{f"model.{name}": value for name, value in small.items()},
        "data.vocab_size": 300,
        "data.train_samples": None,
        "num_train_epochs": 1,
    }
    return measure(["RTE"], ["standard", "weight decay 10"], 2, folder, folder / "runs", base)


if __name__ == "__main__":
    main()
