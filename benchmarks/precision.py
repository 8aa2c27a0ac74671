"""Time per token of our loop in each precision, against a bare fp32 loop, on the 4-layer dim-128 character model.

Both train the same decoder from the same weights on the same batches (a text made by rule, in which every character has
four possible successors). `auto` is what our loop chooses by itself on this machine: it times the candidates that the
hardware has instructions for. With `--compile`, variants through `torch.compile` are timed, too, which adds minutes.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from functools import partial

import torch
from measure import Elsewhere, clock, interleaved, quartiles, ratio
from subjects import CHARACTER, TINY, bare, ours, run_of, same_windows, text_of
from write_up import Table, parser, set_threads, write

from tameformer.recipes.precision import settle_precision
from tameformer.training.precision import PRECISIONS, candidates


def chosen(size, text) -> str:
    """What `precision: auto` becomes here, through the same code as in `tame train`."""
    from tameformer.recipes.catalogue import Recipe
    from tameformer.recipes.char_lm import Config
    from tameformer.training import Engine

    recipe, _ = settle_precision(Recipe("char-lm", "char-lm", Config(precision="auto")), run_of(size, text), Engine())
    return recipe.config.precision


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/precision.py --rounds 15 --compile")
    options.add_argument("--rounds", type=int, default=15, help="turns of every loop")
    options.add_argument("--compile", action="store_true", help="time torch.compile, too")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    size = dataclasses.replace(TINY, seq=8) if given.quick else CHARACTER
    rounds, steps, warmup = (2, 10, 10) if given.quick else (given.rounds, 20, 10)
    text = text_of(size, 5_000 if given.quick else 300_000)
    losses: dict[str, list[float]] = {}
    loops = {"bare fp32": bare(size, text, batches=same_windows, losses=losses.setdefault("bare fp32", []))}
    for name in PRECISIONS:
        loops[f"ours {name}"] = ours(size, text, precision=name, losses=losses.setdefault(f"ours {name}", []))
    if given.compile:
        loops["bare fp32, compiled"] = bare(size, text, batches=same_windows, compiled=True)
        loops["ours fp32, compiled"] = ours(size, text, compiled=True)
    if given.threads > 1:
        started = {name: Elsewhere(loop, partial(losses.get, name)) for name, loop in loops.items()}
        auto = chosen(size, text)
        timings = interleaved(started, rounds=rounds, steps=steps, warmup=warmup)
        losses = {name: told for name, loop in started.items() if (told := loop.close()) is not None}
    else:
        auto = chosen(size, text)
        timings = interleaved(loops, rounds=rounds, steps=steps, warmup=warmup)
    seconds = clock(timings, threads=given.threads)
    # Ours tells the mean of 10 steps; the bare loop's losses are averaged over the same steps.
    bare_losses = losses["bare fp32"]
    losses["bare fp32"] = [
        statistics.fmean(bare_losses[first : first + 10]) for first in range(0, len(bare_losses) - 9, 10)
    ]
    total = warmup + rounds * steps
    table = Table(
        f"{size.show()}; {rounds} rounds of {steps} steps",
        ["loop", "ms per step", "tokens/s", "time / bare fp32", f"loss, steps {max(0, total - 50)} to {total}"],
    )
    final = {name: statistics.fmean(values[max(0, total // 10 - 5) : total // 10]) for name, values in losses.items()}
    for name in loops:
        ms = quartiles([1e3 * second for second in seconds[name]])
        table.rows.append(
            [
                name + (" (auto)" if name == f"ours {auto}" else ""),
                ms.show(1),
                f"{size.tokens / ms.median * 1e3:,.0f}",
                ratio(seconds, name, "bare fp32").show(),
                f"{final[name]:.4f}" if name in final else "",
            ]
        )
    auto_name = f"ours {auto}"
    device = torch.device("cpu")
    notes = [
        f"`precision: auto` chose {auto} among {', '.join(candidates(device))}: "
        f"{ratio(seconds, auto_name, 'bare fp32').show()} of the bare loop's time "
        f"(target at most 0.67 on one thread, 0.75 on two, where the processor has bf16 instructions).",
        f"Loss difference of auto to the bare loop: {abs(final[auto_name] - final['bare fp32']):.4f} (target 0.005).",
        f"{'Processor' if given.threads == 1 else 'Wall clock'} time; median [quartiles] over the rounds.",
    ]
    raw = {"size": dataclasses.asdict(size), "seconds_per_step": timings, "losses": losses}
    name = "precision" if given.threads == 1 else f"precision_{given.threads}_threads"
    write(name, [table], about=__doc__.strip(), notes=notes, raw=raw, options=given)


if __name__ == "__main__":
    main(sys.argv[1:])
