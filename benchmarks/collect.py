"""One table from run folders: the last metrics of each group of seeds, with the command that made it.

Example:
    python benchmarks/collect.py runs/digits-0 runs/digits-1 runs/fashion > table.md
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from tameformer.record import RunReader

SHOWN = (
    "eval/accuracy",
    "eval/accuracy_longer",
    "eval/loss",
    "eval/perplexity",
    "eval/perplexity_per_byte",
    "test/bleu",
    "test/bleu_lowercased",
    "test/bleu_tokenized",
    "test/wer",
    "test/cer",
)


def command(reader: RunReader) -> str:
    """The command of a run without what differs between seeds and machines."""
    words = reader.environment()["command"]
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in ("--output_dir", "--seed", "--resume"):
            skip = True
        else:
            path = Path(word)
            kept.append(f".../{path.parent.name}/{path.name}" if path.is_absolute() else word)
    return " ".join(kept)


def last_metrics(reader: RunReader) -> dict[str, float]:
    values: dict[str, float] = {}
    for line in reader.log():
        values |= {key: line[key] for key in SHOWN if key in line}
    for event in reader.events():
        if event["kind"] == "finish" and "processor_seconds" in event:
            values["processor s"] = event["processor_seconds"]
    return values


def summary(values: list[float]) -> str:
    median = f"{statistics.median(values):.4g}"
    return median if len(values) == 1 else f"{median} [{min(values):.4g}-{max(values):.4g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    machines = set()
    for folder in parser.parse_args().runs:
        reader = RunReader(folder)
        groups[command(reader)].append(last_metrics(reader))
        environment = reader.environment()
        machines.add(f"{environment['hardware']['processor']}, {environment['threads']} thread(s), torch "
                     f"{environment['versions']['torch']}")  # fmt: skip
    print("| command | seeds | metric, median [lowest-highest] |\n|---|---|---|")
    for name, runs in groups.items():
        keys = [key for key in (*SHOWN, "processor s") if all(key in run for run in runs)]
        told = "<br>".join(f"{key} {summary([run[key] for run in runs])}" for key in keys)
        print(f"| `{name}` | {len(runs)} | {told} |")
    print(f"\nMachine: {'; '.join(sorted(machines))}.")


if __name__ == "__main__":
    main()
