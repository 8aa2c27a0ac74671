"""What the guard and the detectors cost a step.

Our loop with both, with the guard alone, and with neither, the probes at their default cadence beside all three; and a plain
loop that reads its loss every step, with and without `tame.Guard`, given the norm that clipping computed, or left to measure
it. All train the same decoder with fused AdamW in fp32. A share of the step, as a difference of two loops, drowns where others
use the machine; so the time inside the guard and the detectors is also taken by itself, on the clock of the thread.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import StepBegins, TrainingLoop, clock, difference_ms, interleaved, quartiles, ratio
from subjects import CHARACTER, HUNDRED_MS, TINY, Size, adamw, bare, mean_loss, model_of, ours, random_windows, text_of
from write_up import Table, parser, set_threads, write

from tameformer.health import Guard, Policy
from tameformer.training import Run

SHOWN = {
    "ours_neither": "ours, probes only",
    "ours_guard": "ours, guard",
    "ours_both": "ours, guard and detectors (default)",
    "plain": "plain loop",
    "plain_guard": "plain loop, tame.Guard given the norm",
    "plain_guard_norm": "plain loop, tame.Guard measures the norm",
}
FLOORS = {
    "ours_guard": "ours_neither",
    "ours_both": "ours_neither",
    "plain_guard": "plain",
    "plain_guard_norm": "plain",
}


class Stopwatch:
    """The thread's time inside some calls."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.thread_time() - begin

        return timed


class LooksAway(Policy):
    """Takes every step and learns nothing, not even from what is not finite."""

    def limits(self) -> tuple[float, float]:
        return math.inf, math.inf

    def observe(self, *args: Any, **kwargs: Any) -> None:
        return None


def unguarded(run: Run) -> Run:
    """Without guard and detectors."""
    return dataclasses.replace(run, guard=LooksAway(), detectors=None)


def timed(run: Run, guard: Stopwatch, detectors: Stopwatch) -> Run:
    """The recipe's run, with a stopwatch around all that guard and detectors are asked in a step."""
    assert run.detectors is not None
    for name in ("limits", "observe", "horizon"):
        setattr(run.guard, name, guard.around(getattr(run.guard, name)))
    run.detectors.observe = detectors.around(run.detectors.observe)
    return run


def undetected(run: Run) -> Run:
    """Without detectors."""
    return dataclasses.replace(run, detectors=None)


def guarded(size: Size, text: Any, *, measures: bool) -> TrainingLoop:
    """The plain loop with `tame.Guard`."""

    def loop(step_begins: StepBegins) -> None:
        model = model_of(size)
        optimizer = adamw(model)
        guard = Guard(model, optimizer)
        for tokens, targets in random_windows(text, size):
            if not step_begins():
                return
            loss = mean_loss(model, tokens, targets)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if guard.step(loss, grad_norm=None if measures else norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()

    return loop


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/guard.py --rounds 30")
    options.add_argument("--rounds", type=int, default=30, help="turns of every loop")
    options.add_argument("--sizes", nargs="+", default=["character", "hundred_ms"], help="which of the two")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    sizes = {"character": CHARACTER, "hundred_ms": HUNDRED_MS}
    tables, raw, notes = [], {}, []
    for name in given.sizes[:1] if given.quick else given.sizes:
        size, rounds = (dataclasses.replace(TINY, seq=8), 2) if given.quick else (sizes[name], given.rounds)
        text = text_of(size, 5_000 if given.quick else 300_000)
        watches = Stopwatch(), Stopwatch()
        loops: dict[str, TrainingLoop] = {
            "ours_neither": ours(size, text, change=unguarded),
            "ours_guard": ours(size, text, change=undetected),
            "ours_both": ours(size, text, change=lambda run, pair=watches: timed(run, *pair)),
            "plain": bare(size, text),
            "plain_guard": guarded(size, text, measures=False),
            "plain_guard_norm": guarded(size, text, measures=True),
        }
        # Ten steps hold one measurement of the default probes; the windows of the guard speak after 64.
        warmup = 10 if given.quick else 70
        timings = interleaved(loops, rounds=rounds, steps=10, warmup=warmup)
        seconds = clock(timings, threads=given.threads)
        inside = [watch.seconds / (warmup + 10 * rounds) for watch in watches]
        step = quartiles(seconds["ours_both"]).median
        raw[name] = {"size": dataclasses.asdict(size), "seconds_per_step": timings, "seconds_inside": inside}
        table = Table(
            f"{name}: {size.show()}; {rounds} rounds of 10 steps", ["loop", "ms over the one without", "ratio to it"]
        )
        for loop, floor in FLOORS.items():
            table.rows.append(
                [SHOWN[loop], difference_ms(seconds, loop, floor).show(3), ratio(seconds, loop, floor).show(4)]
            )
        tables.append(table)
        notes.append(
            f"{name}: inside the guard {1e3 * inside[0]:.3f} ms, inside the detectors {1e3 * inside[1]:.3f} ms a step: "
            f"{100 * sum(inside) / step:.2f} % of a step of {1e3 * step:.1f} ms (at most 1 % wanted)."
        )
    kind = "Processor" if given.threads == 1 else "Wall clock"
    notes.insert(0, f"{kind} time; median [quartiles] over the rounds, each ratio taken within a round.")
    write("guard", tables, about=__doc__.strip(), notes=notes, raw=raw, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
