"""How soon something happens: `tame --help`, and the first optimizer step of `tame train vit-digits --max_steps 1`.

Every figure is of a fresh process, in turns and in random order. Processor seconds are user and system time, up to the
moment named; wall seconds count from the moment the parent starts the child. The end of the first step is stamped by a
wrapper around the `train_step` of the loop's steps; nothing else differs from the command. Python keeps compiled modules
beside their sources, as it does unless told otherwise: the first start of all, not measured, compiles ours.
"""

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence

from measure import quartiles
from write_up import Table, parser, write

STAMP = "print('STAMP', time.process_time(), time.perf_counter())"
FIRST_STEP = f"""
import sys
import time
import tameformer.cli.train as command
from tameformer.cli.__main__ import main
train = command._train
def stamped_train(*args, **kwargs):
    import tameformer.training.guarded as guarded  # imported already
    train_step = guarded.train_step
    def stamped(*args, **kwargs):
        result = train_step(*args, **kwargs)
        {STAMP}
        return result
    guarded.train_step = stamped
    return train(*args, **kwargs)
command._train = stamped_train
code = main(sys.argv[1:])
print('END', time.process_time(), time.perf_counter())
sys.exit(code)
"""
BARE_STEP = f"""
import time
import torch
model = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model(torch.randn(64, 16, 64)).sum().backward()
optimizer.step()
{STAMP}
"""
HELP, TORCH, STEP = "tame --help", "import torch", "first step of vit-digits"
BARE = "first AdamW step of a bare script, no data"
END = "whole command, with one evaluation and the report"


def children() -> dict[str, list[str]]:
    """Command lines by what they show; `{folder}` is a fresh run folder."""
    python = sys.executable
    train = ["train", "vit-digits", "--max_steps", "1", "--output_dir", "{folder}"]
    return {
        HELP: [python, "-m", "tameformer.cli", "--help"],
        TORCH: [python, "-c", f"import time; import torch; {STAMP}"],
        BARE: [python, "-c", BARE_STEP],
        STEP: [python, "-c", FIRST_STEP, *train],
    }


def run(command: Sequence[str], env: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Processor and wall seconds until each stamp, and until the end of the process."""
    with tempfile.TemporaryDirectory() as folder:
        begin, used = time.perf_counter(), os.times()
        command = [part.format(folder=f"{folder}/run") if part == "{folder}" else part for part in command]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        end = time.perf_counter()
    if done.returncode:
        raise RuntimeError(f"{command[1:4]} ended with {done.returncode}: {done.stderr[-2000:]}")
    now = os.times()
    stamps = {
        "exit": (now.children_user + now.children_system - used.children_user - used.children_system, end - begin)
    }
    for name, processor, wall in re.findall(r"^(STAMP|END) (\S+) (\S+)$", done.stdout, re.MULTILINE):
        stamps.setdefault(name, (float(processor), float(wall) - begin))
    return stamps


def imports(command: Sequence[str], env: dict[str, str]) -> dict[str, float]:
    """Milliseconds of import by top-level package; each module counts its own time, without what it imports."""
    with tempfile.TemporaryDirectory() as folder:
        command = [part.format(folder=f"{folder}/run") if part == "{folder}" else part for part in command]
        command = [command[0], "-X", "importtime", *command[1:]]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    spent: dict[str, float] = defaultdict(float)
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", done.stderr, re.MULTILINE):
        spent[name.partition(".")[0]] += int(own) / 1e3
    return dict(sorted(spent.items(), key=lambda item: -item[1]))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/startup.py --rounds 10")
    options.add_argument("--rounds", type=int, default=10, help="fresh processes of each kind")
    given = options.parse_args(arguments)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(given.threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "",
    }
    rounds = 1 if given.quick else given.rounds
    commands, order = children(), random.Random(0)
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    if not given.quick:
        run(commands[STEP], env)  # the first compiles, and reads files that no cache holds
    for _ in range(rounds):
        for name in order.sample(sorted(commands), len(commands)):
            stamps = run(commands[name], env)
            seconds[name].append(stamps["exit"] if name == HELP else stamps["STAMP"])
            if name == STEP:
                seconds[END].append(stamps["END"])
    table = Table(f"{rounds} fresh processes each", ["until", "processor s", "wall s"])
    for name in (HELP, TORCH, BARE, STEP, END):
        table.rows.append([name, *(quartiles(column).show(2) for column in zip(*seconds[name], strict=True))])
    over, beside = (
        quartiles([step[0] - other[0] for step, other in zip(seconds[STEP], seconds[name], strict=True)])
        for name in (TORCH, BARE)
    )
    notes = [
        f"`tame --help`: {quartiles([s[0] for s in seconds[HELP]]).show(2)} s of processor time (target below 0.5).",
        f"First step after torch's import: {over.show(2)} s of processor time (target at most 0.5).",
        f"First step after the bare script's: {beside.show(2)} s. Torch's own optimizers import its compiler when the first "
        "one is made; ours (`optim/eager.py`) do not.",
    ]
    spent, of_bare = ({}, {}) if given.quick else (imports(commands[name], env) for name in (STEP, BARE))
    details = Table(
        "Imports of the training command beyond those of the bare script, one process, own time", ["package", "ms"]
    )
    extra = {name: ms - of_bare.get(name, 0.0) for name, ms in spent.items()}
    for name, ms in sorted(extra.items(), key=lambda item: -item[1])[:20]:
        details.rows.append([name, f"{ms:.0f}"])
    raw = json.loads(json.dumps({"seconds": seconds, "imports_ms": spent, "imports_of_bare_ms": of_bare}))
    write("startup", [table, details], about=__doc__.strip(), notes=notes, raw=raw, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
