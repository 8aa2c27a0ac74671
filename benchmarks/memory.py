"""Peak memory of our loop with default monitors against the bare loop, each in fresh processes, in turns.

Counted is resident memory as the kernel sees it. The package's imports (accelerate, TensorBoard, ...) cost a fixed amount
that a larger model does not raise, so there are two figures: the whole peak of the process, and the growth, which is the
peak minus what was resident just before the first step, with model and text in memory and everything imported. The
target's ratio is of the growth: it is what decides whether a model fits. The bare loop is part of these benchmarks, so
its process imports our package, too; what that costs stands in a column of its own, and "peak / bare" charges ours with
it. The peak's mark is set back before the first step where the kernel allows it, so that no transient of an import
counts.
"""

import dataclasses
import gc
import json
import random
import sys
from collections.abc import Sequence

from measure import forget_peak, quartiles, resident, told_by
from write_up import Table, parser, set_threads, write

LOOPS = ("bare", "ours", "ours_unmonitored")


def child(name: str, steps: int, quick: bool) -> None:
    """Train for some steps and print what was resident before, and the peak."""
    import torch
    import torch._dynamo  # every optimizer of torch imports it

    assert torch is not None
    alone = resident("VmRSS")
    import tameformer.recipes.launch  # noqa: F401  all that `tame train` imports

    imports = resident("VmRSS") - alone
    from measure import Paused
    from subjects import MIDDLE, TINY, bare, ours, text_of

    size = TINY if quick else MIDDLE
    text = text_of(size, 20_000)
    loop = {"bare": bare, "ours": ours, "ours_unmonitored": lambda *a: ours(*a, monitored=False)}[name](size, text)
    paused = Paused(loop)  # stands before its first step
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    paused.advance(steps)
    print("MEMORY", json.dumps({"imports": imports, "before": before, "peak": resident("VmHWM")}))
    paused.close()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/memory.py --rounds 5")
    options.add_argument("--rounds", type=int, default=5, help="fresh processes of each loop")
    options.add_argument(
        "--steps", type=int, default=10, help="steps in a process; 10 and more write a line of the log"
    )
    options.add_argument("--child", choices=LOOPS, help="be one of those processes")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    if given.child is not None:
        child(given.child, given.steps, given.quick)
        return
    order, names = random.Random(0), LOOPS[:2] if given.quick else LOOPS
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(1 if given.quick else given.rounds):
        for name in order.sample(names, len(names)):
            command = [sys.executable, __file__, "--child", name, "--steps", str(given.steps)]
            command += ["--threads", str(given.threads), *(["--quick"] if given.quick else [])]
            taken[name].append(told_by(command, "MEMORY"))
    from subjects import MIDDLE, TINY

    size = TINY if given.quick else MIDDLE
    growth = {name: [one["peak"] - one["before"] for one in values] for name, values in taken.items()}
    table = Table(
        f"{size.show()}; {len(taken['bare'])} processes each, MiB",
        ["loop", "our imports", "before the first step", "peak", "growth", "growth / bare", "peak / bare"],
    )
    ratios = {}
    for name in names:
        ratios[name] = quartiles([mine / theirs for mine, theirs in zip(growth[name], growth["bare"], strict=True)])
        whole = [
            mine["peak"] / (theirs["peak"] - (theirs["imports"] if name != "bare" else 0))
            for mine, theirs in zip(taken[name], taken["bare"], strict=True)
        ]
        columns = [[one[key] for one in taken[name]] for key in ("imports", "before", "peak")] + [growth[name]]
        shown = [quartiles(column).show(0) for column in columns]
        table.rows.append([name, *shown, ratios[name].show(), quartiles(whole).show()])
    notes = [f"Growth of ours over the bare loop's: {ratios['ours'].show()} (target at most 1.02)."]
    raw = {"size": dataclasses.asdict(size), "mib": taken}
    write("memory", [table], about=__doc__.strip(), notes=notes, raw=raw, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
