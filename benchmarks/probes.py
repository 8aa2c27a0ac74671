"""What watching costs: the step of a causal language model with a probe on it over the same step without.

One model takes all steps; within a round every variant has its turn, in random order, and ratios are taken inside the round.
Where there is an accelerator it is measured there, under autocast to bf16. Peak memory is the accelerator's, or that of the
resident set, whose mark is set back before the step; the extra is the watched step's peak minus the plain one's, median over
rounds. Ratios within about 0.01 of 1 are below the noise of whole steps: the share of the parts, in the last column, is
measured by timing the callbacks themselves and is the better number there.
"""

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from measure import Quartiles, device, growth, now, quartiles
from subjects import GPT2, Size, mean_loss, model_of, random_tokens
from torch import nn
from torch.optim import AdamW
from write_up import Table, parser, set_threads, write

from tameformer.patch import Observer
from tameformer.probes import PROBES, Probe, Watch, default_probes
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.readings import Readings

Watches = dict[str, Watch]
Found = dict[str, tuple[Quartiles, float, float]]
NOTES = ["Floor of all but attention entropy: 8 to 12 bytes a parameter, against 28 for AdamW's update."]
EVENTS = [name for name in vars(Observer) if name.startswith("on_")]


class Subject:
    """A model in training, a step at a time."""

    def __init__(self, size: Size) -> None:
        self.size, self.model = size, model_of(size).to(device())
        self.optimizers = {
            "fused": AdamW(self.model.parameters(), lr=1e-4, fused=True),
            "default": AdamW(self.model.parameters(), lr=1e-4),
        }
        self.batch = [one.to(device()) for one in random_tokens(size)]

    def autocast(self) -> torch.autocast:
        """bf16 on an accelerator."""
        return torch.autocast(device().type, torch.bfloat16, enabled=device().type != "cpu")

    def step(self, watch: Watch | None, optimizer: str = "fused") -> None:
        """Forward, backward, update, and the numbers on the host."""
        watching: AbstractContextManager[None] = nullcontext() if watch is None else watch.watching(1)
        with watching:
            with self.autocast():
                loss = mean_loss(self.model, *self.batch)
            loss.backward()
            self.optimizers[optimizer].step()
        self.optimizers[optimizer].zero_grad()
        if watch is not None:
            Readings(watch.read()).values()


class Stopwatch:
    """Adds up the processor's time inside a probe's callbacks and reading."""

    def __init__(self, probe: Probe) -> None:
        self.seconds = 0.0
        for name in [*EVENTS, "read"]:
            if getattr(type(probe), name) is not getattr(Probe, name):
                setattr(probe, name, self._timed(getattr(probe, name)))

    def _timed(self, call: Callable) -> Callable:
        def timed(*args):
            begin = time.process_time()
            try:
                return call(*args)
            finally:
                self.seconds += time.process_time() - begin

        return timed


def compare(
    subject: Subject, watches: Watches, *, rounds: int, seed: int = 0, also: dict[str, str] | None = None
) -> Found:
    """By variant: time over the plain step, extra peak memory in MiB, and the callbacks' share of the plain step.

    Args:
        subject: The model.
        watches: Variants by name.
        rounds: Turns of each.
        seed: Of the order.
        also: Unwatched variants by name, with the optimizer they step with.
    """
    order, also = random.Random(seed), also or {}
    clocks = {name: [Stopwatch(probe) for probe, _ in watch.probes] for name, watch in watches.items()}
    runs: dict[str, Callable[[], object]] = {"plain": lambda: subject.step(None)}
    runs |= {name: (lambda watch=watch: subject.step(watch)) for name, watch in watches.items()}
    runs |= {name: (lambda kind=kind: subject.step(None, kind)) for name, kind in also.items()}
    for run in runs.values():
        run()
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    peaks: dict[str, list[float]] = {name: [] for name in runs}
    for each in (clock for of_variant in clocks.values() for clock in of_variant):
        each.seconds = 0.0
    for _ in range(rounds):
        for name in order.sample(sorted(runs), len(runs)):
            begin = now()
            peaks[name].append(growth(runs[name]))
            seconds[name].append(now() - begin)
    plain = quartiles(seconds["plain"]).median
    found = {}
    for name in runs:
        if name != "plain":
            ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            extra = quartiles([a - b for a, b in zip(peaks[name], peaks["plain"], strict=True)]).median
            share = sum(clock.seconds for clock in clocks.get(name, [])) / rounds / plain
            found[name] = quartiles(ratios), extra, share
    return found


def watches_of(model: nn.Module, optimizer: AdamW) -> Watches:
    """Every probe alone, all but attention entropy together, and all together; each at every step."""
    alone = {
        name: Watch(model, [(build(model, [optimizer]), 1)], optimizers=[optimizer]) for name, build in PROBES.items()
    }
    others = [probe for probe in default_probes(model, [optimizer]) if not isinstance(probe, AttentionEntropy)]
    everything = default_probes(model, [optimizer])
    return {
        **alone,
        "all but attention entropy": Watch(model, [(probe, 1) for probe in others], optimizers=[optimizer]),
        "all": Watch(model, [(probe, 1) for probe in everything], optimizers=[optimizer]),
    }


def table_of(title: str, found: Found) -> Table:
    """As a person reads it."""
    table = Table(title, ["variant, at every step", "time / plain", "extra peak MiB", "callbacks' share of a step"])
    for name, (ratio, extra, share) in found.items():
        table.rows.append([name, ratio.show(), f"{extra:+.1f}", f"{100 * share:.2f} %"])
    return table


def sizes(*, quick: bool) -> list[Size]:
    """Of the tables."""
    if quick:
        return [Size(num_layers=1, dim=32, num_heads=4, seq=16, batch=2)]
    if device().type != "cpu":
        return [GPT2]
    middle = Size(num_layers=12, dim=256, num_heads=4, seq=256, batch=2)
    return [middle, dataclasses.replace(middle, batch=16)]


def raw_numbers(found: Found) -> dict[str, dict[str, object]]:
    """What `compare` found, for the file."""
    return {
        name: {"ratio": dataclasses.asdict(ratio), "extra_peak_mib": extra, "share": share}
        for name, (ratio, extra, share) in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/probes.py --rounds 25")
    options.add_argument("--rounds", type=int, default=25, help="turns of each variant")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    rounds = 2 if given.quick else given.rounds
    tables, raw = [], {}
    for size in sizes(quick=given.quick):
        subject = Subject(size)
        watches = watches_of(subject.model, subject.optimizers["fused"])
        also = {"unwatched, torch's default AdamW": "default"}
        few = max(2, rounds // (1 if size.tokens < 1000 else 4))
        found = compare(subject, watches, rounds=few, also=also)
        raw[f"all probes, {size.tokens} tokens"] = raw_numbers(found)
        table = table_of(f"Every probe: {size.show()}", found)
        entropy, rest = found["attention_entropy"], found["all but attention entropy"]
        at_cadence = 1 + (entropy[0].median - 1) / 10 + (rest[0].median - 1) / 50
        table.rows.append(["default set at its cadence (10; 50), from the rows above", f"{at_cadence:.4f}", "", ""])
        tables.append(table)
    name = "probes" if device().type == "cpu" else f"probes_{device().type}"
    write(name, tables, about=__doc__ or "", notes=NOTES, raw=raw, options=given)


if __name__ == "__main__":
    main()
