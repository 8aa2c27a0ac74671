"""What watching costs: the step of a causal language model with a probe on it over the same step without.

One model takes all steps; within a round every variant has its turn, in random order, and ratios are taken inside the round.
Where there is an accelerator it is measured there, under autocast to bf16. Peak memory is the accelerator's, or that of the
resident set, whose mark is set back before the step; the extra is the watched step's peak minus the plain one's, median over
rounds. Ratios within about 0.01 of 1 are below the noise of whole steps, so there are parts beside them: the share of the
callbacks, timed by themselves, and what a step of eight tokens takes longer when it is watched, which is all that does not
grow with tokens: hooks, modes, what is read, and work on weights. Their sum, over the time of the plain step, counts some of
it twice and bounds the cost from above.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from measure import Quartiles, Stopwatch, device, difference_ms, growth, now, quartiles, ratio
from subjects import GPT2, Size, mean_loss, model_of, random_tokens
from torch import nn
from torch.optim import AdamW
from write_up import Table, parser, set_threads, write

from tameformer.patch import Observer
from tameformer.probes import PROBES, Probe, Watch, default_probes
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.readings import Readings

Watches = dict[str, Watch]
NOTES = ["Floor of all but attention entropy: 8 to 12 bytes a parameter, against 28 for AdamW's update."]
EVENTS = [name for name in vars(Observer) if name.startswith("on_")]


@dataclass(frozen=True)
class Cost:
    """Of a watched step."""

    ratio: Quartiles
    """Time over the plain step's."""
    extra_ms: Quartiles
    """Time minus the plain step's."""
    extra_peak_mib: float
    share: float
    """The callbacks' own time over the plain step's."""


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


def stopwatch(probe: Probe) -> Stopwatch:
    """Of a probe's callbacks and reading."""
    return Stopwatch(
        probe, [name for name in [*EVENTS, "read"] if getattr(type(probe), name) is not getattr(Probe, name)]
    )


def compare(
    subject: Subject, watches: Watches, *, rounds: int, seed: int = 0, also: dict[str, str] | None = None
) -> tuple[float, dict[str, Cost]]:
    """The seconds of a plain step, and the cost of each variant.

    Args:
        subject: The model.
        watches: Variants by name.
        rounds: Turns of each.
        seed: Of the order.
        also: Unwatched variants by name, with the optimizer they step with.
    """
    order, also = random.Random(seed), also or {}
    clocks = {name: [stopwatch(probe) for probe, _ in watch.probes] for name, watch in watches.items()}
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
            extra = quartiles([a - b for a, b in zip(peaks[name], peaks["plain"], strict=True)]).median
            share = sum(clock.seconds for clock in clocks.get(name, [])) / rounds / plain
            times = ratio(seconds, name, "plain"), difference_ms(seconds, name, "plain")
            found[name] = Cost(*times, extra, share)
    return plain, found


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


def table_of(title: str, found: dict[str, Cost]) -> Table:
    """As a person reads it."""
    table = Table(title, ["variant, at every step", "time / plain", "extra peak MiB", "callbacks' share of a step"])
    for name, cost in found.items():
        table.rows.append([name, cost.ratio.show(), f"{cost.extra_peak_mib:+.1f}", f"{100 * cost.share:.2f} %"])
    return table


def without_tokens(size: Size, *, rounds: int) -> dict[str, Cost]:
    """The cost where a step has eight tokens only."""
    subject = Subject(dataclasses.replace(size, seq=8, batch=1))
    return compare(subject, watches_of(subject.model, subject.optimizers["fused"]), rounds=rounds)[1]


def parts_of(few_tokens: Cost | None, cost: Cost, plain: float) -> list[str]:
    """The columns of the parts; empty for what was not measured on eight tokens."""
    if few_tokens is None:
        return ["", ""]
    return [few_tokens.extra_ms.show(1), f"{1 + few_tokens.extra_ms.median / 1e3 / plain + cost.share:.4f}"]


def sizes(*, quick: bool) -> list[Size]:
    """Of the tables."""
    if quick:
        return [Size(num_layers=1, dim=32, num_heads=4, seq=16, batch=2)]
    if device().type != "cpu":
        return [GPT2]
    middle = Size(num_layers=12, dim=256, num_heads=4, seq=256, batch=2)
    return [middle, dataclasses.replace(middle, batch=16)]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/probes.py --rounds 25")
    options.add_argument("--rounds", type=int, default=25, help="turns of each variant")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    rounds = 2 if given.quick else given.rounds
    of_sizes = sizes(quick=given.quick)
    few_tokens = without_tokens(of_sizes[0], rounds=rounds)
    tables, raw = [], {"8 tokens": {name: dataclasses.asdict(cost) for name, cost in few_tokens.items()}}
    for size in of_sizes:
        subject = Subject(size)
        watches = watches_of(subject.model, subject.optimizers["fused"])
        also = {"unwatched, once more": "fused", "unwatched, torch's default AdamW": "default"}
        few = max(2, rounds // (1 if size.tokens < 1000 else 4))
        plain, found = compare(subject, watches, rounds=few, also=also)
        raw[f"{size.tokens} tokens"] = {name: dataclasses.asdict(cost) for name, cost in found.items()}
        table = table_of(f"{size.show()}; a plain step takes {plain:.2f} s", found)
        table.head = [*table.head, "longer with 8 tokens, ms", "at most, by parts"]
        table.rows = [[*row, *parts_of(few_tokens.get(row[0]), found[row[0]], plain)] for row in table.rows]
        entropy, rest = found["attention_entropy"], found["all but attention entropy"]
        at_cadence = 1 + (entropy.ratio.median - 1) / 10 + (rest.ratio.median - 1) / 50
        table.rows.append(["default set at its cadence (10; 50), from the rows above", f"{at_cadence:.4f}", *[""] * 4])
        tables.append(table)
    name = "probes" if device().type == "cpu" else f"probes_{device().type}"
    write(name, tables, about=__doc__ or "", notes=NOTES, raw=raw, options=given)


if __name__ == "__main__":
    main()
