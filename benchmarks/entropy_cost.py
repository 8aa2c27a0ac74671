"""What attention entropy of every head at every step costs: the step of a causal language model with the probe over without.

One model takes all steps; within a round every variant has its turn, in random order, and ratios are taken inside the round.
The step without is there twice: its second row shows how far the clock is to be trusted. Whole steps vary more than the rows
cost; the probe works in the forward pass, so that is timed alone as well, reading included, and what it takes longer is given
as a share of the step. Both are medians: every tenth look, which is at the whole pass, is not in them. Peak memory is the
accelerator's, or that of the resident set, whose mark is set back before the step; the extra is the watched step's peak minus
the plain one's, median over rounds.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

from measure import Quartiles, device, in_turns, quartiles
from probes import Subject, Watches, compare, table_of
from subjects import GPT2, Size, mean_loss
from torch import nn
from torch.optim import AdamW
from write_up import parser, set_threads, write

from tameformer.probes import Watch
from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.probes.exact_attention_entropy import ExactAttentionEntropy
from tameformer.readings import Readings

AGAIN = "unwatched, once more"
NOTES = [
    "Floor of 32 rows: 2 r T D a head and sequence looked at, over 14 T^2 D for attention itself: r / 7T of attention.",
    "Floor of the exact form: the scores once more, 2 of 14 T^2 D, 14 % of attention, over its share of the step.",
]


def watches_of(model: nn.Module, optimizer: AdamW) -> Watches:
    """The ways of measuring it."""
    return {
        "32 rows, one sequence (default)": Watch(model, [(AttentionEntropy(), 1)], optimizers=[optimizer]),
        "32 rows, every sequence": Watch(model, [(AttentionEntropy(), 1)], optimizers=[optimizer], sequences=None),
        "exact, every query": Watch(model, [(ExactAttentionEntropy(), 1)], optimizers=[optimizer], sequences=None),
    }


def sizes(*, quick: bool) -> list[Size]:
    """The same number of tokens in sequences of three lengths."""
    if quick:
        return [Size(num_layers=1, dim=32, num_heads=4, seq=16, batch=4)]
    size = Size(num_layers=6, dim=256, num_heads=4, seq=128, batch=16) if device().type == "cpu" else GPT2
    return [dataclasses.replace(size, seq=seq, batch=size.tokens // seq) for seq in (128, 512, 1024)]


def added_shares(subject: Subject, watches: Watches, *, rounds: int) -> dict[str, Quartiles]:
    """By variant, what a watched forward pass takes longer, over the time of a plain step."""

    def forward(watch: Watch | None) -> None:
        with nullcontext() if watch is None else watch.watching(1), subject.autocast():
            mean_loss(subject.model, *subject.batch)
        if watch is not None:
            Readings(watch.read()).values()

    calls = {"plain": lambda: forward(None), AGAIN: lambda: forward(None)}
    calls |= {name: (lambda watch=watch: forward(watch)) for name, watch in watches.items()}
    seconds = in_turns(calls, rounds=rounds)
    step = quartiles(in_turns({"step": lambda: subject.step(None)}, rounds=max(1, rounds // 6))["step"]).median
    return {
        name: quartiles([(a - b) / step for a, b in zip(seconds[name], seconds["plain"], strict=True)])
        for name in seconds
        if name != "plain"
    }


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/entropy_cost.py --rounds 12")
    options.add_argument(
        "--rounds", type=int, default=12, help="turns of each variant; three times as many of the forward pass"
    )
    given = options.parse_args(arguments)
    set_threads(given.threads)
    tables, raw = [], {}
    for size in sizes(quick=given.quick):
        subject = Subject(size)
        watches = watches_of(subject.model, subject.optimizers["fused"])
        rounds = 2 if given.quick else given.rounds
        _, found = compare(subject, watches, rounds=rounds, also={AGAIN: "fused"})
        added = added_shares(subject, watches, rounds=3 * rounds)
        raw[f"T={size.seq}"] = {
            name: {**dataclasses.asdict(cost), "forward": dataclasses.asdict(added[name])}
            for name, cost in found.items()
        }
        table = table_of(f"{size.show()}, causal", found)
        table.head = [*table.head, "longer forward pass, % of a step"]
        table.rows = [
            [*row, Quartiles(*(100 * part for part in dataclasses.astuple(added[row[0]]))).show(2)]
            for row in table.rows
        ]
        tables.append(table)
    name = "entropy_cost" if device().type == "cpu" else f"entropy_cost_{device().type}"
    write(name, tables, about=__doc__ or "", notes=NOTES, raw=raw, options=given)


if __name__ == "__main__":
    main()
