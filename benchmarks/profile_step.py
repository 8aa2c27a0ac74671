"""Where our loop spends its fixed cost: every part of a step of the tiny model, timed alone.

Processor time of each part in microseconds, the median over interleaved rounds. Parts that run every 10 steps are shown
per step. The parts do not add up to the whole: alone, each finds its data in the cache.
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from measure import quartiles
from subjects import TINY, mean_loss, random_windows, run_of, text_of
from write_up import Table, parser, set_threads, write

from tameformer.optim import clip_norm
from tameformer.readings import Readings
from tameformer.record import RunWriter
from tameformer.training import CheckpointFolder, Engine, Listeners, Loop, StopRequest, train_step
from tameformer.training.interval import Interval
from tameformer.training.listeners import RecordListener, TensorBoardListener

EVERY = 10
Part = Callable[[], object]


def parts(folder: Path, size, text) -> tuple[dict[str, tuple[Part, int]], Callable[[], None]]:
    """Parts by name with how many steps share one call, and what closes the files."""
    run = run_of(size, text)
    engine = Engine()
    recorded, board = RecordListener(RunWriter(folder)), TensorBoardListener(folder)
    loop = Loop(run, engine, CheckpointFolder(folder), Listeners(recorded, board), StopRequest())
    model, optimizer = run.model, run.optimizers[0]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    batches = run.batches(start=0, stop=10**9, rank=0, world_size=1)
    micro = next(batches)
    watch = run.watch
    assert watch is not None
    result = train_step(engine, model, run.optimizers, micro, run.loss, clip=run.clip)
    mean_loss(model, micro[0]["tokens"], micro[0]["targets"]).backward()
    gradients = [p.grad for p in parameters]
    for _ in range(EVERY):
        loop.progress.interval.add(2.5, 1.0, result.num_items)
    plain = random_windows(text, size)

    values = {**loop.progress.interval.line(), "train/lr": 1e-3}
    factor = torch.ones(())

    def forward_backward() -> None:
        (run.loss(model, micro[0]) * (1 / size.tokens)).backward()
        optimizer.zero_grad(set_to_none=True)

    def bare_forward_backward() -> None:
        mean_loss(model, micro[0]["tokens"], micro[0]["targets"]).backward()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        give_gradients()
        optimizer.step()

    def give_gradients() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def clip() -> None:
        give_gradients()
        clip_norm(iter(parameters), 1e9)

    def clip_of_torch() -> None:
        give_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)

    def contexts() -> None:
        with ExitStack(), engine.accumulate(model, last=True), engine.autocast():
            pass

    def armed() -> None:
        with watch.watching(EVERY):
            pass

    def watched_forward() -> None:
        with watch.watching(EVERY):
            model(micro[0]["tokens"])

    def unwatched_forward() -> None:
        model(micro[0]["tokens"])

    def add_and_read() -> None:
        interval = Interval()
        for _ in range(EVERY):
            interval.add(2.5, 1.0, result.num_items)
        interval.line()

    def rates() -> None:
        scale = run.schedule(0)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale

    watched_forward()
    measured = Readings(watch.read()).values()
    step_of_log = iter(range(10**9))
    timed: dict[str, tuple[Part, int]] = {
        "forward, backward (ours: sum, scaled)": (forward_backward, 1),
        "forward, backward (bare: mean)": (bare_forward_backward, 1),
        "optimizer.step, fused AdamW, our two groups": (step, 1),
        "zero_grad of no gradients": (optimizer.zero_grad, 1),
        "next batch from our stream": (lambda: next(batches), 1),
        "next batch of a plain script": (lambda: next(plain), 1),
        "_before_update whole": (loop.steps._before_update, 1),
        "  torch.manual_seed": (lambda: torch.manual_seed(1), 1),
        "  the default generator's manual_seed": (lambda: torch.default_generator.manual_seed(1), 1),
        "  schedule and rates": (rates, 1),
        "clip_norm, ours, no clipping needed": (clip, 1),
        "torch's clip_grad_norm_": (clip_of_torch, 1),
        "contexts: ExitStack, accumulate, autocast": (contexts, 1),
        "engine.place": (lambda: engine.place(micro[0]), 1),
        "engine.sum": (lambda: engine.sum([64, False]), 1),
        "zeros and adding the loss": (lambda: torch.zeros(()).add_(factor), 1),
        "loss.item() of the bare loop": (factor.item, 1),
        "Interval.add, and read / 10": (add_and_read, EVERY),
        "watch: on and off / 10": (armed, EVERY),
        "forward with probe / 10": (watched_forward, EVERY),
        "forward without probe / 10": (unwatched_forward, EVERY),
        "reading the probes / 10": (lambda: Readings(watch.read()).values(), EVERY),
        "log.jsonl line / 10": (lambda: recorded.on_log(next(step_of_log), values), EVERY),
        "probes.jsonl line / 10": (lambda: recorded.on_probe(next(step_of_log), measured), EVERY),
        "TensorBoard line / 10": (lambda: board.on_log(next(step_of_log), values), EVERY),
        "train_step whole": (
            lambda: train_step(engine, model, run.optimizers, micro, run.loss, clip=run.clip),
            1,
        ),
    }

    def close() -> None:
        recorded.on_train_end(0)
        board.on_train_end(0)

    return timed, close


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/profile_step.py --rounds 15")
    options.add_argument("--rounds", type=int, default=15, help="times that every part is timed")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    size = dataclasses.replace(TINY, seq=8) if given.quick else TINY
    rounds, calls = (1, 2) if given.quick else (given.rounds, 40)
    text = text_of(size, 5_000 if given.quick else 100_000)
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        timed, close = parts(Path(folder), size, text)
        for _ in range(rounds):
            for name, (part, shared) in timed.items():
                start = time.process_time()
                for _ in range(calls):
                    part()
                taken.setdefault(name, []).append((time.process_time() - start) / calls / shared * 1e6)
        close()
    table = Table(f"tiny: {size.show()}", ["part", "microseconds per step"])
    table.rows = [[name, quartiles(values).show(1)] for name, values in taken.items()]
    write("profile_step", [table], about=__doc__.strip(), notes=[], raw=taken, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
