"""What holding a model to its pretrained weights costs: the whole training step with Mixout or prior decay over the plain one.

Each variant has a model and a fused AdamW of its own and takes its turn in every round, in
random order; ratios are taken inside the round. Dropout is beside them as what Mixout takes the place of.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from measure import Quartiles, in_turns, ratio
from subjects import Size, mean_loss, model_of, random_tokens
from torch import nn
from torch.optim import AdamW
from write_up import Table, parser, set_threads, write

from tameformer.finetune import mixout, per_neuron, prior_decay

Held = Callable[[nn.Module, torch.optim.Optimizer | None], object]
NOTES = [
    "Floor of Mixout per weight: a random number, a choice and a scaling for each held weight and pass, whatever batch; per "
    "neuron it draws one number a column. Of prior decay: three more reads and one write of each held weight a step.",
    "Both keep the pretrained weights beside the model: as much memory again as the weights they hold.",
]


def variants() -> dict[str, Held]:
    """By name; what comes before the optimizer is called without one."""
    return {
        "plain": lambda model, optimizer: None,
        "dropout": lambda model, optimizer: None,
        "mixout": lambda model, optimizer: None if optimizer else mixout(model, 0.5),
        "mixout by neuron": lambda model, optimizer: None if optimizer else mixout(model, 0.5, draw=per_neuron),
        "prior_decay": lambda model, optimizer: prior_decay(model, optimizer, decay=0.01) if optimizer else None,
    }


def step_of(size: Size, name: str, held: Held) -> Callable[[], object]:
    """One training step of a model of its own."""
    model = model_of(size).train()
    for module in model.modules() if name == "dropout" else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    held(model, None)
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
    held(model, optimizer)
    tokens, targets = random_tokens(size)

    def step() -> None:
        mean_loss(model, tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(size: Size, *, rounds: int, seed: int = 0) -> dict[str, Quartiles]:
    """By variant: time over the plain step."""
    steps = {name: step_of(size, name, held) for name, held in variants().items()}
    seconds = in_turns(steps, rounds=rounds, seed=seed)
    return {name: ratio(seconds, name, to="plain") for name in steps if name != "plain"}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "python benchmarks/finetune.py --rounds 31")
    options.add_argument("--rounds", type=int, default=31, help="turns of each variant")
    given = options.parse_args(arguments)
    set_threads(given.threads)
    table = Table("Time of a step over the plain one", ["tokens a step", *list(variants())[1:]])
    raw: dict[str, object] = {}
    for tokens in (32,) if given.quick else (512, 2048):
        size = Size(num_layers=6, dim=256, num_heads=4, seq=64, batch=tokens // 64)
        if given.quick:
            size = Size(num_layers=1, dim=32, num_heads=4, seq=16, batch=2)
        found = compare(size, rounds=2 if given.quick else given.rounds)
        raw[str(tokens)] = {name: dataclasses.asdict(ratio) for name, ratio in found.items()}
        table.rows.append([str(tokens), *(ratio.show() for ratio in found.values())])
    about = "Fine-tuning steps of a model of 6 layers, dim 256, AdamW, one thread; processor time."
    write("finetune", [table], about=about, notes=NOTES, raw=raw, options=given)


if __name__ == "__main__":
    main()
