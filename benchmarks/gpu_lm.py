"""GPT-2 124M on one accelerator: tokens per second, MFU and peak memory of a bare loop and of ours, in one run.

12 layers, dim 768, 12 heads, context 1024, vocabulary 50257 padded to 50304; bf16 autocast, fused AdamW, clipping at 1;
random tokens that live on the device. Ours goes through `Run` and `Loop` with its default monitors: attention entropy of
every head, `log.jsonl` and TensorBoard every 10 steps. The bare loop reads its loss every step. The loops take turns of a
few steps in random order; the clock is read after the device has caught up. Ratios are taken within a round.

MFU = (6 N + 12 L d T) x tokens per second / peak, with N the parameters without position embeddings (tied token embeddings
counted once, as output layer), L layers, d width, T context, and by default the 989 TFLOP/s dense bf16 peak of H100 and
H200. The attention term counts the whole T x T matrix, causal or not, as PaLM and nanoGPT do.
"""

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import StepBegins, TrainingLoop, clock, device, interleaved, quartiles, ratio
from subjects import GPT2, Size, adamw, mean_loss, model_of, run_of
from torch import Tensor, nn
from write_up import Table, parser, write

from tameformer.record import RunReader, RunWriter
from tameformer.training import CheckpointFolder, Engine, Listeners, Loop, StopRequest
from tameformer.training.listeners import RecordListener, TensorBoardListener
from tameformer.training.precision import PRECISIONS

TOY = Size(num_layers=2, dim=64, num_heads=2, seq=32, batch=0, vocab_size=250)


def flops_per_token(size: Size, model: nn.Module) -> float:
    """Floating-point operations of forward and backward per token: 6 N + 12 L d T."""
    positions = sum(p.numel() for name, p in model.named_parameters() if name.startswith("positions."))
    parameters = sum(p.numel() for p in model.parameters()) - positions
    return 6 * parameters + 12 * size.num_layers * size.dim * size.seq


def tokens_of(size: Size, micro_batch: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A few random micro-batches on the device."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(size.vocab_size, (count, micro_batch, size.seq + 1), generator=generator).to(device())
    return [(one[:, :-1].contiguous(), one[:, 1:].contiguous()) for one in drawn]


class PeakMemory:
    """Largest memory allocated on the device while the owner's turns ran, in GiB; 0 without an accelerator."""

    def __init__(self) -> None:
        self.gib = 0.0

    def begin(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        if torch.cuda.is_available():
            self.gib = max(self.gib, torch.cuda.max_memory_allocated() / 2**30)


def waiting(step_begins: StepBegins) -> StepBegins:
    """The same, but where a turn may end the device is waited for first, so that the clock sees all work."""
    state = {"steps": 0}

    def begins() -> bool:
        if state["steps"] % TURN == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()
        state["steps"] += 1
        return step_begins()

    return begins


TURN = 10


def bare_loop(size: Size, micro_batch: int, accumulation: int, *, compiled: bool) -> TrainingLoop:
    """A plain script: accumulate, clip, fused AdamW, loss read every step."""
    batches = tokens_of(size, micro_batch)

    def loop(step_begins: StepBegins) -> None:
        step_begins = waiting(step_begins)
        plain = model_of(size).to(device())
        model: Any = torch.compile(plain) if compiled else plain
        optimizer = adamw(plain)
        number = 0
        while step_begins():
            total = torch.zeros((), device=device())
            for _ in range(accumulation):
                tokens, targets = batches[number % len(batches)]
                number += 1
                with torch.autocast(device().type, torch.bfloat16):
                    loss = mean_loss(model, tokens, targets) / accumulation
                loss.backward()
                total += loss.detach()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total.item()

    return loop


def our_loop(
    size: Size, micro_batch: int, accumulation: int, *, compiled: bool, seen: dict[str, int] | None = None
) -> TrainingLoop:
    """The same through `Run` and `Loop`, monitors on; `seen` gets how many lines hold attention entropies."""
    batches = tokens_of(size, micro_batch)
    num_items = micro_batch * size.seq

    def loop(step_begins: StepBegins) -> None:
        step_begins = waiting(step_begins)

        def stream(*, start: int, stop: int, rank: int, world_size: int) -> Iterator[list[dict[str, Any]]]:
            for step in range(start, stop):
                if not step_begins():
                    return
                chosen = (batches[(step * accumulation + part) % len(batches)] for part in range(accumulation))
                yield [{"tokens": tokens, "targets": targets, "num_items": num_items} for tokens, targets in chosen]

        engine = Engine(autocast_dtype=PRECISIONS["bf16"].autocast_dtype)
        model = model_of(size).to(engine.device)
        if compiled:
            model.compile()
        run = replace(run_of(replace(size, batch=micro_batch), _short_text(size), model=model), batches=stream)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            listener = Listeners(RecordListener(RunWriter(folder)), TensorBoardListener(folder))
            Loop(run, engine, CheckpointFolder(folder), listener, StopRequest()).train()
            if seen is not None:
                reader = RunReader(folder)
                seen["lines"] = len(reader.log())
                seen["with_entropy"] = sum("train/attention_entropy" in line for line in reader.log())

    return loop


def _short_text(size: Size):
    import numpy as np

    return np.zeros(1024 * size.seq, dtype=np.uint16)  # never read: the tokens above are


def fitting_micro_batch(size: Size, largest: int) -> int:
    """The largest power of two of sequences that one step of the bare loop fits with a fifth of the memory to spare.

    Both loops live on the device at once, but activations only in turns: their weights and moments are what is spared.
    """
    if not torch.cuda.is_available():
        return largest
    budget = torch.cuda.get_device_properties(0).total_memory * 0.8
    micro_batch = 1
    while micro_batch < largest:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = model_of(size).cuda()
        (tokens, targets), *_ = tokens_of(size, micro_batch, count=1)
        with torch.autocast("cuda", torch.bfloat16):
            loss = mean_loss(model, tokens, targets)
        loss.backward()
        peak = torch.cuda.max_memory_allocated()
        del model, loss, tokens, targets
        if 2 * peak > budget:
            break
        micro_batch *= 2
    torch.cuda.empty_cache()
    return micro_batch


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "PYTHONPATH=src python3 benchmarks/gpu_lm.py --compile both")
    options.add_argument("--rounds", type=int, default=8, help="turns of every loop")
    options.add_argument("--steps", type=int, default=TURN, help=f"steps in a turn, a multiple of {TURN}")
    options.add_argument("--tokens_per_step", type=int, default=2**19, help="by accumulation")
    options.add_argument(
        "--micro_batch", type=int, default=None, help="sequences at a time; default: what fits, up to 64"
    )
    options.add_argument("--compile", choices=["on", "off", "both"], default="both", help="torch.compile")
    options.add_argument("--peak_tflops", type=float, default=989.0, help="dense bf16 peak of the device")
    given = options.parse_args(arguments)
    if given.steps % TURN:
        options.error(f"--steps must be a multiple of {TURN}, got {given.steps}")
    if given.quick:
        torch.set_num_threads(given.threads)
    size, tokens_per_step, rounds = GPT2, given.tokens_per_step, given.rounds
    if given.quick:
        size, tokens_per_step, rounds = TOY, 4 * TOY.seq, 1
    torch.set_float32_matmul_precision("high")
    micro_batch = given.micro_batch or (2 if given.quick else fitting_micro_batch(size, 64))
    accumulation = max(1, math.ceil(tokens_per_step / (micro_batch * size.seq)))
    tokens = accumulation * micro_batch * size.seq
    kinds = {"on": [True], "off": [False], "both": [False, True]}[given.compile]
    if given.quick:
        kinds = [False]  # compiling takes longer than everything else together
    loops: dict[str, TrainingLoop] = {}
    seen: dict[str, dict[str, int]] = {}
    for compiled in kinds:
        suffix = ", compiled" if compiled else ""
        loops[f"bare{suffix}"] = bare_loop(size, micro_batch, accumulation, compiled=compiled)
        seen[f"ours{suffix}"] = {}
        loops[f"ours{suffix}"] = our_loop(
            size, micro_batch, accumulation, compiled=compiled, seen=seen[f"ours{suffix}"]
        )
    memory = {name: PeakMemory() for name in loops}
    warmup = 2 * TURN  # the second logged step finds every kernel built
    timings = interleaved(
        loops,
        rounds=rounds,
        steps=given.steps,
        warmup=warmup,
        around=lambda name: (memory[name].begin, memory[name].end),
    )
    seconds = clock(timings, threads=0)
    model = model_of(size)
    flops = flops_per_token(size, model)
    table = Table(
        f"{size.num_layers} layers, dim {size.dim}, {accumulation} x {micro_batch} x {size.seq} tokens a step; "
        f"{rounds} rounds of {given.steps} steps",
        ["loop", "ms per step", "tokens/s", "MFU", "time / bare", "peak GiB"],
    )
    for name in loops:
        rate = quartiles([tokens / second for second in seconds[name]])
        table.rows.append(
            [
                name,
                quartiles([1e3 * second for second in seconds[name]]).show(1),
                f"{rate.median:,.0f} [{rate.low:,.0f}-{rate.high:,.0f}]",
                f"{flops * rate.median / given.peak_tflops / 1e12:.1%}",
                ratio(seconds, name, name.replace("ours", "bare")).show(),
                f"{memory[name].gib:.2f}",
            ]
        )
    notes = [
        f"MFU = (6 N + 12 L d T) x tokens/s / peak = {flops:.4g} FLOP per token, peak {given.peak_tflops:g} TFLOP/s.",
        "Peak GiB is of what was allocated on the device during the loop's turns, the other loops' weights and moments "
        "included.",
        *(
            f"{name}: {count.get('with_entropy', 0)} of {count.get('lines', 0)} log lines hold attention entropies."
            for name, count in seen.items()
        ),
        "Floor 330,000 tokens/s on one H100 or H200, good 400,000, stretch 475,000, monitors on.",
    ]
    raw = {
        "size": dataclasses.asdict(size),
        "micro_batch": micro_batch,
        "accumulation": accumulation,
        "flops_per_token": flops,
        "peak_tflops": given.peak_tflops,
        "seconds_per_step": timings,
        "peak_gib": {name: peak.gib for name, peak in memory.items()},
        "log_lines": seen,
    }
    write("gpu_lm", [table], about=__doc__.strip(), notes=notes, raw=raw, options=given)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1:])
