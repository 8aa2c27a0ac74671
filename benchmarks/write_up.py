"""What a benchmark leaves behind: a table on the screen, and the same with the raw numbers in `benchmarks/results/`."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass
class Table:
    """Rows under a title and a head."""

    title: str
    head: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """As Markdown with aligned columns, which is also what the terminal shows."""
        lines = [list(self.head), *map(list, self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.head))]
        shown = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        return "\n".join(
            [f"## {self.title}", "", shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:], ""]
        )


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share."""
    options = argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--quick", action="store_true", help="toy sizes, seconds: shows that it runs, measures nothing"
    )
    options.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files")
    options.add_argument(
        "--threads", type=int, default=1, help="of torch; with 1 the processor's time is taken (default)"
    )
    return options


def set_threads(threads: int) -> None:
    """Give torch so many threads, in this process and in those it starts."""
    import torch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    if threads == 1:  # the processor's time counts: spinning threads would charge one loop for another's wait
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    torch.set_num_threads(threads)


def write(
    name: str,
    tables: Sequence[Table],
    *,
    about: str,
    notes: Sequence[str],
    raw: Mapping[str, Any],
    options: argparse.Namespace,
) -> None:
    """Print the tables and write `NAME.json` and `NAME.md`.

    Args:
        name: Of the files.
        tables: What a person reads.
        about: One paragraph: what is compared with what.
        notes: Sentences below the tables.
        raw: Every measured number, for those who want another statistic.
        options: As parsed; `output` says where to.
    """
    where = machine(options.threads)
    told = {
        "Processor": f"{where['hardware']['processor']}, {where['hardware']['cores']} cores, load {where['load']}",
        "Accelerators": ", ".join(where["hardware"]["accelerators"]) or "none",
        "Versions": ", ".join(f"{package} {number}" for package, number in where["versions"].items()),
        "Threads": f"{where['threads']}, OMP_WAIT_POLICY {where['wait_policy']}",
        "Commit": (where["git"].get("commit") or "unknown")[:10]
        + (" with changes" if where["git"].get("dirty") else ""),
        "Date": where["started"],
        "Command": f"`{where['shell']}`",
    }
    text = "\n".join(
        [
            f"# {name}",
            "",
            about,
            "",
            *(table.markdown() for table in tables),
            *(f"- {note}" for note in notes),
            *([""] if notes else []),
            *(f"{key}: {value}  " for key, value in told.items()),
            "",
        ]
    )
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(text, encoding="utf-8")
    content = {
        "machine": where,
        "tables": [{"title": t.title, "head": list(t.head), "rows": [list(r) for r in t.rows]} for t in tables],
        "notes": list(notes),
        "raw": raw,
    }
    (options.output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def machine(threads: int) -> dict[str, Any]:
    """Hardware, versions, threads, date and command; the load shows how busy the neighbours were."""
    from tameformer.training.environment import environment

    found = environment(world_size=1)
    for package in ("transformers", "tensorboard"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    script = Path(sys.argv[0])
    arguments = [f".../{Path(word).name}" if word.startswith("/") else word for word in sys.argv[1:]]
    found["command"] = [script.name, *arguments]  # without the folders of one machine
    found["shell"] = shlex.join(["python", f"benchmarks/{script.name}", *arguments])
    found["threads"] = threads
    found["wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "not set")
    found["load"] = " ".join(f"{load:.1f}" for load in os.getloadavg())
    found["bf16_instructions"] = _bf16()
    return found


def _bf16() -> bool:
    from tameformer.training.precision import has_bf16_instructions

    return has_bf16_instructions()
