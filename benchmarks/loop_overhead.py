"""What the loop costs per step beyond forward, backward and update.

Compared with a floor that nobody can go below (one batch over and over, no clipping, the loss never read), a bare script
that reads its loss every step, accelerate's plain loop, and the Hugging Face Trainer. All train the same decoder with
fused AdamW in fp32; each reads its batches of the same text in its own usual way. Ours writes `log.jsonl`, TensorBoard
and the attention entropies every 10 steps; the Trainer logs every 10 steps to memory only.
"""

import dataclasses
import sys
from collections.abc import Sequence

from measure import clock, difference_ms, interleaved, quartiles, ratio
from subjects import CHARACTER, HUNDRED_MS, TINY, bare, floor, ours, text_of, with_accelerate, with_trainer
from write_up import Table, parser, set_threads, write

SHOWN = {
    "floor": "floor: fixed batch, no clipping, no log",
    "bare": "bare loop, loss read every step",
    "accelerate": "accelerate, loss read every step",
    "trainer": "Hugging Face Trainer, log every 10",
    "ours": "ours, default monitors every 10",
    "ours_unmonitored": "ours, nothing logged",
    "bare_again": "the bare loop once more",
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/loop_overhead.py --rounds 30")
    options.add_argument("--rounds", type=int, default=30, help="turns of every loop")
    options.add_argument("--sizes", nargs="+", default=["tiny", "character", "hundred_ms"], help="which of the three")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    measured, tables, raw = {}, [], {}
    # size, steps in a turn, and share of the rounds
    plans = {"tiny": (TINY, 20, 1.0), "character": (CHARACTER, 10, 0.5), "hundred_ms": (HUNDRED_MS, 10, 0.6)}
    for name in given.sizes[:1] if given.quick else given.sizes:
        size, steps, share = plans[name]
        rounds = max(2, round(given.rounds * share))
        if given.quick:
            size, steps, rounds = dataclasses.replace(TINY, seq=8), 10, 2
        text = text_of(size, 5_000 if given.quick else 300_000)
        loops = {
            "floor": floor(size, text),
            "bare": bare(size, text),
            "accelerate": with_accelerate(size, text),
            "trainer": with_trainer(size, text),
            "ours": ours(size, text),
            "ours_unmonitored": ours(size, text, monitored=False),
            "bare_again": bare(size, text),
        }
        timings = interleaved(loops, rounds=rounds, steps=steps, warmup=10)
        seconds = measured[name] = clock(timings, threads=given.threads)
        raw[name] = {"size": dataclasses.asdict(size), "seconds_per_step": timings}
        table = Table(
            f"{name}: {size.show()}; {rounds} rounds of {steps} steps",
            ["loop", "ms per step", "ms over the floor", "ratio to the bare loop"],
        )
        for loop in loops:
            table.rows.append(
                [
                    SHOWN[loop],
                    quartiles([1e3 * second for second in seconds[loop]]).show(2),
                    difference_ms(seconds, loop, "floor").show(2),
                    ratio(seconds, loop, "bare").show(),
                ]
            )
        tables.append(table)
    notes = [f"{'Processor' if given.threads == 1 else 'Wall clock'} time; median [quartiles] over the rounds."]
    if "tiny" in measured:
        tiny = measured["tiny"]
        over, beside = difference_ms(tiny, "ours", "floor"), difference_ms(tiny, "ours", "bare")
        notes += [
            f"Fixed cost per step with default monitors, from the tiny model: {beside.show(2)} ms over the bare loop (target "
            f"at most 0.45), {over.show(2)} ms over the floor.",
            f"At a 100 ms step {beside.median:.2f} ms are a ratio of {1 + beside.median / 100:.4f} (target at most 1.01). The "
            "whole step cannot tell: where a loop's tensors lie moves it more, as the same bare loop once more shows.",
        ]
    write("loop_overhead", tables, about=__doc__.strip(), notes=notes, raw=raw, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
