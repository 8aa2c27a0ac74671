"""What faults cost in the end: the digits, clean and with faults, the same seeds.

The faults are those that a long run meets, in one run of some hundred steps: NaN from single batches, a few in a row; losses
a thousand times as large; a window of damaged images that is longer than what may be skipped, so that the run goes back to a
checkpoint and passes over it; memory that runs out; a disk that is full in a save. Accuracy is on the test images, after the
last step; the difference is taken within a seed.
"""

import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from write_up import Table, parser, set_threads, write

FAULTS = {
    "clean": "",
    "single steps": "nan@40,nan@90-93,inf-grad@130,spike@150x1000,spike@200-203x1000",
    "a window of damaged images": "bad-batch@150-162",
    "memory and disk": "oom@60,oom@140,enospc@save",
    "all of them": "nan@40,nan@90-93,inf-grad@130,spike@150x1000,oom@60,oom@140,enospc@save,bad-batch@180-192",
}
KINDS = ("step_skipped", "rollback", "out_of_memory", "checkpoint_failed", "diverged")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/recovery.py --seeds 5")
    options.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    from tameformer.recipes import launch
    from tameformer.record import RunReader
    from tameformer.studies.statistics import interval

    changes = {"checkpoint.every": 20, "checkpoint.keep_last": 3, "loop.eval_steps": 1000, "loop.logging_steps": 50}
    if given.quick:
        changes |= {"max_steps": 45, "data.batch_size": 8, "model.dim": 8, "model.num_layers": 1, "model.num_heads": 2}
    seeds = range(1 if given.quick else given.seeds)
    raw: dict[str, list[dict]] = {name: [] for name in FAULTS}
    with tempfile.TemporaryDirectory() as folder, patch.object(launch.report, "write_report"):  # nobody reads 25 pages
        for seed in seeds:
            for name, faults in FAULTS.items():
                run = Path(folder) / f"{name}-{seed}"
                result = launch.train(
                    "vit-digits", overrides={**changes, "seed": seed, "output_dir": str(run)}, inject=faults
                )
                did = Counter(event["kind"] for event in RunReader(run).events() if event["kind"] in KINDS)
                values = {key.replace("/", "_"): result.metrics[key] for key in ("eval/accuracy", "eval/loss")}
                raw[name].append({"seed": seed, "steps": result.step, **values, "events": dict(did)})
    table = Table(
        f"{len(seeds)} seeds; mean with its 95 % interval",
        ["run", "accuracy, %", "loss", "accuracy against clean, points", "what the guard did, all seeds together"],
    )
    for name, runs in raw.items():
        accuracy = [100 * run["eval_accuracy"] for run in runs]
        clean = [100 * run["eval_accuracy"] for run in raw["clean"]]
        did = sum((Counter(run["events"]) for run in runs), Counter())
        table.rows.append(
            [
                name,
                _shown(interval(accuracy), 2),
                _shown(interval([run["eval_loss"] for run in runs]), 4),
                "" if name == "clean" else _shown(interval([a - b for a, b in zip(accuracy, clean, strict=True)]), 2),
                ", ".join(f"{kind} {count}" for kind, count in did.items()) or "nothing",
            ]
        )
    notes = [f"{name}: `--inject {faults}`" for name, faults in FAULTS.items() if faults]
    write("recovery", [table], about=__doc__.strip(), notes=notes, raw=raw, options=given)


def _shown(found, digits: int) -> str:
    width = "" if found.half_width is None else f" ± {found.half_width:.{digits}f}"
    return f"{found.mean:.{digits}f}{width}"


if __name__ == "__main__":
    main(sys.argv[1:])
