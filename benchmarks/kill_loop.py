"""SIGKILL at random instants, two thirds of them aimed at saves, then a resume: again and again.

One process imports the toolkit once and forks a child for each stretch of a run; the child is `tameformer.train`, and it
is killed by a real SIGKILL. A third of the kills come when the temporary folder of a checkpoint has appeared, after a random
part of what a save takes; a third when the log shows that the next step ends in a save; a third at any time. After each kill
the folder is looked at as the crash left it, and the next child resumes with `resume="auto"`. A run is killed
until it is finished; then its checkpoint is compared, by SHA-256, with that of a run that was never killed.

Counted are: resumes that fail; checkpoints under a final name that do not verify (a resume would pass them over); kills
after which more than one interval of steps is lost; runs that end with other weights, moments or log lines.
"""

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from write_up import Table, parser, set_threads, write

STEPS, EVERY = 36, 3
SMALL = {
    "max_steps": STEPS,
    "checkpoint.every": EVERY,
    "data.batch_size": 32,
    "data.augment": ["shift"],
    "model.dim": 16,
    "model.num_layers": 1,
    "loop.logging_steps": 1,  # so that the log tells how far the run was
    "loop.eval_steps": STEPS,
    "optim.ema_decay": 0.9,
    "precision": "fp32",
}
PROBES = ("head_output", "branch_share", "dead_units", "activations", "rank_residual", "spectral_norm", "grad_norm",
          "grad_rms_over_epsilon", "update_ratio", "log_partition")  # fmt: skip


def train(folder: Path) -> None:
    """A child's life."""
    from tameformer.recipes import launch

    launch.report.write_report = lambda folder: None  # the page of a finished run is not what is killed here
    overrides = {**SMALL, **{f"probes.{name}": None for name in PROBES}, "output_dir": str(folder)}
    launch.train("vit-digits", overrides=overrides, resume="auto")


def forked(work: Callable[[], None], log: Path) -> int:
    """The number of a child process that does the work and leaves nothing but its exit code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        work()
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def step_of(folder: Path) -> int:
    """The last step that the log tells of."""
    try:
        lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def temporary(folder: Path) -> list[Path]:
    """The checkpoints that are being written."""
    with contextlib.suppress(FileNotFoundError):
        return list((folder / "checkpoints").glob(".step-*"))
    return []


def await_moment(folder: Path, draw: random.Random, child: int, remains: set[Path]) -> tuple[str, bool]:
    """Return when the child is to be killed: how that was chosen, and whether the child still lives."""
    aim = draw.choice(["save", "before a save", "any time"])
    begun, skip = step_of(folder), draw.randrange(3)
    until = time.monotonic() + draw.uniform(0.0, 4.0)
    seen: set[Path] = set()
    while True:
        if os.waitpid(child, os.WNOHANG)[0]:
            return aim, False
        if aim == "save":
            new = set(temporary(folder)) - remains - seen
            if new and len(seen) == skip:
                time.sleep(draw.uniform(0.0, 0.02))
                return aim, True
            seen |= new
        elif aim == "before a save":
            step = step_of(folder)
            if step >= begun + 2 and step % EVERY == EVERY - 1:
                time.sleep(draw.uniform(0.0, 0.06))
                return aim, True
        elif time.monotonic() > until:
            return aim, True
        time.sleep(0.0005)


def as_left(folder: Path) -> str:
    """What the kill interrupted."""
    writing = temporary(folder)
    if not writing:
        return "no checkpoint was being written"
    files = {path.name for path in writing[-1].iterdir()}
    return f"{len(files)} of 5 files written" if "manifest.json" not in files else "all files written, not published"


def fingerprint(folder: Path) -> tuple:
    """The finished run: hashes of all files of its last checkpoint, and its log without times."""
    manifest = json.loads((folder / f"checkpoints/step-{STEPS:06d}/manifest.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]
    tensors = {name: file["sha256"] for name, file in manifest["files"].items() if name.endswith("safetensors")}
    return tensors, kept


def loop(kills: int, seed: int, folder: Path, *, minutes: float) -> dict:
    """Kill that often, or for so long; what came of it."""
    until = time.monotonic() + 60 * minutes
    from tameformer.training import CheckpointFolder

    draw, found = random.Random(seed), []
    straight = folder / "straight"
    log = folder / "output.txt"
    if os.waitpid(forked(lambda: train(straight), log), 0)[1]:
        raise RuntimeError(f"the straight run failed: {log.read_text()[-2000:]}")
    expected = fingerprint(straight)
    runs = failures = differ = 0
    while len(found) < kills and time.monotonic() < until:
        runs += 1
        run, done = folder / f"run-{runs}", False
        while not done and len(found) < kills and time.monotonic() < until:
            remains = set(temporary(run))
            child = forked(lambda run=run: train(run), log)
            aim, lives = await_moment(run, draw, child, remains)
            if not lives:
                done = (run / f"checkpoints/step-{STEPS:06d}").is_dir() and '"finish"' in (
                    run / "events.jsonl"
                ).read_text()
                if not done:
                    failures += 1
                    print(log.read_text()[-3000:], file=sys.stderr)
                    break
                continue
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if not os.WIFSIGNALED(status):  # it ended by itself in that moment
                continue
            newest, skipped = CheckpointFolder(run).newest_verified()
            saved = int(newest.name.removeprefix("step-")) if newest else 0
            left = as_left(run)
            print(f"kill {len(found) + 1}, after step {step_of(run)}: {left}", file=sys.stderr)
            found.append(
                {"aim": aim, "left": left, "lost": step_of(run) - saved, "damaged": len(skipped), "step": saved}
            )
        if not done:  # the last run, whose kills are spent: it must still end well
            done = os.waitpid(forked(lambda run=run: train(run), log), 0)[1] == 0
            failures += not done
        differ += done and fingerprint(run) != expected
    return {"kills": found, "runs": runs, "failures": failures, "differ": differ}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/kill_loop.py --kills 200")
    options.add_argument("--kills", type=int, default=200, help="how often")
    options.add_argument("--minutes", type=float, default=600.0, help="end after these, with fewer kills")
    options.add_argument("--seed", type=int, default=0, help="of the instants")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    # What a child would import; it computes nothing here, so that a fork finds no threads but this one.
    import torch.utils.tensorboard  # noqa: F401

    import tameformer.recipes.launch  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        result = loop(3 if given.quick else given.kills, given.seed, Path(folder), minutes=given.minutes)
    kills = result["kills"]
    counts = Table("Counted", ["what", "how many"])
    counts.rows = [
        ["kills", str(len(kills))],
        ["runs that were killed until they finished", str(result["runs"])],
        ["resumes that failed", str(result["failures"])],
        ["checkpoints under a final name that did not verify", str(sum(kill["damaged"] for kill in kills))],
        ["kills that lost more than one interval", str(sum(kill["lost"] > EVERY for kill in kills))],
        ["runs whose weights, moments, average or log differ from the straight run's", str(result["differ"])],
    ]
    where = Table("What the kills interrupted", ["found afterwards", "kills"])
    where.rows = [[left, str(number)] for left, number in Counter(kill["left"] for kill in kills).most_common()]
    lost = Table(f"Steps lost, with a checkpoint every {EVERY}", ["steps", "kills"])
    lost.rows = [[str(steps), str(number)] for steps, number in sorted(Counter(kill["lost"] for kill in kills).items())]
    write("kill_loop", [counts, where, lost], about=__doc__.strip(), notes=[], raw=result, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
