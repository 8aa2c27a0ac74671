"""The same steps by one process, by several with whole weights (DDP), and by several with weights shared out (FSDP2).

The global batch is the same throughout, so a step of N processes would take 1 / N of one's time if exchanging were free. Every
process has as many threads as `--threads` says, and one process with N times as many stands beside. Counted is wall time,
because what several processes do at once is the question; each configuration starts afresh in every round, in turns. "state" is
what a process keeps of weights and moments between steps; "growth" is its peak in a step beyond what was resident before.
"""

import dataclasses
import gc
import json
import random
import sys
import time
from collections.abc import Sequence

from measure import forget_peak, quartiles, resident, told_by
from write_up import Table, parser, set_threads, write

KINDS = ("one", "one, all threads", "ddp", "fsdp")


def child(kind: str, steps: int, quick: bool) -> None:
    """Take some steps and, in the first process, print how long each took and what each process held."""
    import torch
    from subjects import MIDDLE, TINY, adamw, model_of, random_tokens

    from tameformer.optim import NormClip
    from tameformer.recipes.char_lm import language_loss
    from tameformer.tensors import local_part
    from tameformer.training import Engine
    from tameformer.training.sharding import share_out
    from tameformer.training.step import train_step

    size = TINY if quick else MIDDLE
    engine, model = Engine(), model_of(size)
    if kind == "fsdp":
        share_out(model, device=engine.device)
    optimizer = adamw(model)
    prepared, clip = engine.prepare(model), NormClip([optimizer], 1.0)
    tokens, targets = (whole.chunk(engine.world_size)[engine.rank] for whole in random_tokens(size))
    batch = {"tokens": tokens, "targets": targets, "num_items": targets.numel()}
    seconds = []
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    for _ in range(steps):
        engine.wait()
        started = time.perf_counter()
        train_step(engine, prepared, [optimizer], [batch], language_loss, clip=clip)
        seconds.append(time.perf_counter() - started)
    kept = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    state = sum(local_part(one).nbytes for one in kept if isinstance(one, torch.Tensor)) / 2**20
    told = engine.gather([{"state": state, "growth": resident("VmHWM") - before}])
    if engine.is_main:
        print("SCALING", json.dumps({"seconds": seconds[len(seconds) // 4 :], "processes": told}))
    if engine.world_size > 1:
        torch.distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/scaling.py --rounds 5")
    options.add_argument("--rounds", type=int, default=5, help="fresh starts of each configuration")
    options.add_argument("--steps", type=int, default=16, help="steps after a start; the first quarter is not counted")
    options.add_argument("--processes", type=int, default=2, help="how many share the work")
    options.add_argument("--child", choices=KINDS, help="be one of those processes")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    if given.child is not None:
        child(given.child, given.steps, given.quick)
        return
    order, kinds = random.Random(0), ("one", "fsdp") if given.quick else KINDS
    taken: dict[str, list[dict]] = {kind: [] for kind in kinds}
    for _ in range(1 if given.quick else given.rounds):
        for kind in order.sample(kinds, len(kinds)):
            several = kind in ("ddp", "fsdp")
            command = [sys.executable]
            if several:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={given.processes}"]
            threads = given.threads * (given.processes if kind == "one, all threads" else 1)
            command += [__file__, "--child", kind, "--steps", str(4 if given.quick else given.steps)]
            command += ["--threads", str(threads), *(["--quick"] if given.quick else [])]
            taken[kind].append(told_by(command, "SCALING"))
    from subjects import MIDDLE, TINY

    size = TINY if given.quick else MIDDLE
    table = Table(
        f"{size.show()}; {len(taken['one'])} starts each, {given.processes} processes",
        ["", "ms a step", "times one's speed", "state, MiB a process", "growth, MiB a process"],
    )
    of_one = [quartiles(start["seconds"]).median for start in taken["one"]]
    for kind in kinds:
        medians = [quartiles(start["seconds"]).median for start in taken[kind]]
        speed = quartiles([alone / mine for alone, mine in zip(of_one, medians, strict=True)])
        held = {
            key: quartiles([max(one[key] for one in start["processes"]) for start in taken[kind]])
            for key in ("state", "growth")
        }
        time_ = quartiles([1e3 * second for second in medians])
        table.rows.append([kind, time_.show(1), speed.show(2), f"{held['state'].median:.1f}", held["growth"].show(0)])
    raw = {"size": dataclasses.asdict(size), "starts": taken}
    write("scaling", [table], about=__doc__.strip(), notes=[], raw=raw, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
