"""Remedies for fine-tuning on little data, side by side: eight ways on four tasks of GLUE, several seeds each.

Each way is a comparison of seeds in a folder of its own, so that the script goes on where it was ended. It starts from an
encoder that `tame train masked-lm` has trained. The value of a run is that of its last weights: nothing is chosen by the
texts that judge.
"""

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from write_up import Table, parser, set_threads, write

from tameformer.recipes.config import ProbesConfig
from tameformer.recipes.launch import train
from tameformer.studies import compare

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
    "data.train_samples": 500,
    "num_train_epochs": EPOCHS,
    "evals_per_epoch": 1,
    "precision": "fp32",
    "checkpoint.best_metric": None,
    **{f"probes.{field.name}": None for field in fields(ProbesConfig)},
}
WAYS: Mapping[str, Mapping[str, Any]] = {
    "standard": {},
    "intermediate task": {"init_from": "..."},
    "layer-wise decay of the rate, 0.8": {"finetune.layer_decay": 0.8},
    "Mixout 0.5, no dropout": {"finetune.mixout": 0.5, "model.dropout": 0.0},
    "decay to the pretrained, 1": {"finetune.prior_decay": 1.0, "optim.weight_decay": 0.0},
    "weight decay 1": {"optim.weight_decay": 1.0},
    "top layer re-initialized": {"finetune.reinit_layers": 1},
    "three times as long": {"num_train_epochs": 3 * EPOCHS},
}
NOTES = [
    f"500 training texts, {EPOCHS} epochs in batches of 16, Adam with its bias correction, warm-up over a tenth, linear decay.",
    "One set of 500 for each seed. F1 for MRPC (judged by the last tenth of its training texts), Matthews' correlation for "
    "CoLA (in domain), accuracy for the others; a row of +- is the standard deviation over the seeds that finished.",
    "Intermediate task: 2,000 texts, three epochs, of MRPC for RTE and the reverse, of SST-2 for CoLA and the reverse.",
]


def texts_of(task: str, data: Path) -> dict[str, Any]:
    """The keys that say what is learned."""
    learn, judge, _ = TASKS[task]
    return {"data.path": str(data / learn), "data.validation_path": None if judge is None else str(data / judge)}


def intermediate(task: str, data: Path, folder: Path, base: Mapping[str, Any]) -> Path:
    """The run that learned the task that comes before this one, trained now if it has not been."""
    run = folder / f"before-{task}"
    values = {**base, **texts_of(BEFORE[task], data), "output_dir": str(run)}
    if values["data.train_samples"] is not None:
        values["data.train_samples"] *= 4
    train("text-classification", overrides=values, resume="auto")  # one that has finished answers at once
    return run


def measure(
    tasks: Sequence[str], ways: Sequence[str], seeds: int, data: Path, folder: Path, base: Mapping[str, Any]
) -> dict[str, dict[str, list[float]]]:
    """By way and task, the values of the seeds that finished; tasks inside ways, so that a part is a table of fewer ways."""
    found: dict[str, dict[str, list[float]]] = {}
    for way in ways:
        for task in tasks:
            metric = TASKS[task][2]
            values = {**base, **texts_of(task, data), **WAYS[way]}
            if "init_from" in WAYS[way]:
                values["init_from"] = str(intermediate(task, data, folder, base))
            results = compare(
                "text-classification",
                vary={},
                seeds=seeds,
                overrides=values,
                metric=metric,
                jobs=1,
                output_dir=folder / f"{task}, {way}".replace(" ", "_").replace(",", ""),
            )
            known = [result.value(metric) for result in results.cells if result.state == "finished"]
            found.setdefault(way, {})[task] = [value for value in known if value is not None]
            print(f"{way}, {task}: {_show(found[way][task])}", flush=True)
    return found


def _show(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return f"{100 * mean:.1f}"
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{100 * mean:.1f} +- {100 * deviation:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(
        __doc__, "python benchmarks/finetune_table.py --data DATA --pretrained runs/masked-lm --runs runs/table"
    )
    options.add_argument("--data", type=Path, help="folder with rte, mrpc, cola and sst2")
    options.add_argument("--pretrained", type=Path, help="run of masked-lm")
    options.add_argument("--runs", type=Path, help="where the runs go, and go on")
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    given = options.parse_args(arguments)
    set_threads(given.threads)
    if given.quick:
        with tempfile.TemporaryDirectory() as name:
            found, tasks = _toy(Path(name)), ["RTE"]
    elif None in (given.data, given.pretrained, given.runs):
        options.error("--data, --pretrained and --runs are needed")
    else:
        base, tasks = {**BASE, "init_from": str(given.pretrained)}, given.tasks
        found = measure(tasks, list(WAYS), given.seeds, given.data, given.runs, base)
    rows = [[way, *(_show(values[task]) for task in tasks)] for way, values in found.items()]
    table = Table("Per cent, mean +- standard deviation", ["", *tasks], rows)
    about = "Ways to fine-tune a small encoder, 4 layers of dim 128, that was pre-trained for minutes: see the notes for sizes."
    write("finetune_table", [table], about=about, notes=NOTES, raw=found, options=given)


def _toy(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Two ways on texts made here."""
    (folder / "rte").mkdir()
    rows = [
        {"sentence1": "a warm day", "sentence2": ("a cold day", "it is warm")[n % 2], "label": n % 2} for n in range(24)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in TASKS["RTE"][:2]:
        (folder / str(name)).with_suffix("").write_text(text, encoding="utf-8")
    small = {
        "model.dim": 8,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "data.vocab_size": 300,
        "data.train_samples": None,
    }
    TASKS["RTE"] = ("rte/train.jsonl", "rte/validation.jsonl", "eval/accuracy")
    base = {**BASE, **small, "num_train_epochs": 1}
    return measure(["RTE"], ["standard", "weight decay 1"], 2, folder, folder / "runs", base)


if __name__ == "__main__":
    main()
