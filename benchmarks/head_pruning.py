"""How many heads of a trained run can go, and of which attention (Michel et al. 2019, arXiv:1905.10650; Voita et al. 2019).

Heads are ranked by `tame.head_importance` on training batches; then the least important ones are turned off, in one kind of
attention at a time and in all of them, and the run's own evaluation says what that costs.

Example:
    python benchmarks/head_pruning.py runs/translation
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import tameformer as tame
from tameformer.patch import PatchHandle
from tameformer.recipes.catalogue import resolve
from tameformer.recipes.resume import find_checkpoint
from tameformer.training import Engine
from tameformer.training import checkpoint as checkpoints
from tameformer.training.checkpoint import load_model_tensors

SHARES = (0.25, 0.5, 0.75, 1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("run", type=Path)
    options.add_argument("--batches", type=int, default=8, help="of training, that importance is taken from")
    options.add_argument("--metric", default="loss")
    given = options.parse_args(arguments)
    recipe = resolve(str(given.run))
    run = recipe.build(recipe.config, given.run)
    checkpoint, _ = find_checkpoint(given.run, str(given.run))
    assert checkpoint is not None, "find_checkpoint refuses"
    load_model_tensors(run.model, checkpoints.load(checkpoint).model)
    run.model.eval()
    stream = run.batches(start=0, stop=given.batches, rank=0, world_size=1)
    batches = [batch for (batch,) in islice(stream, given.batches)]
    importance = tame.head_importance(
        run.model, batches, lambda model, batch: run.loss(model, batch) / batch["num_items"]
    )

    def measured() -> float:
        with torch.no_grad():
            return run.evaluate(Engine(), run.model)[given.metric]

    with tame.gate_heads(run.model) as gates:
        print(f"{given.metric} with all heads: {measured():.4g}\n")
        print(f"| heads turned off, of | {' | '.join(f'{share:.0%}' for share in SHARES)} | all but one a layer |")
        print("|---|" + "---|" * (len(SHARES) + 1))
        for kind, names in kinds(importance).items():
            chosen = {name: importance[name] for name in names}
            costs = []
            for off in [least(chosen, share) for share in SHARES] + [all_but_one(chosen)]:
                turn(gates, off, 0.0)
                costs.append(f"{measured():.4g}")
                turn(gates, off, 1.0)
            print(f"| {kind} ({sum(map(len, chosen.values()))}) | {' | '.join(costs)} |", flush=True)


def kinds(importance: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The layers' attentions by what is left of their names without numbers, and all together.

    Example:
        >>> kinds({"a.0.self": torch.ones(1), "a.1.self": torch.ones(1), "a.0.cross": torch.ones(1)})
        {'a.*.self': ['a.0.self', 'a.1.self'], 'a.*.cross': ['a.0.cross'], 'all': ['a.0.self', 'a.1.self', 'a.0.cross']}
    """
    found: dict[str, list[str]] = {}
    for name in importance:
        found.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(name)
    return {**found, "all": list(importance)} if len(found) > 1 else found


def least(importance: Mapping[str, Tensor], share: float) -> list[tuple[str, int]]:
    """The share of the heads that matters least; a layer may lose them all."""
    order = sorted((float(value), name, head) for name, one in importance.items() for head, value in enumerate(one))
    return [(name, head) for _, name, head in order[: round(share * len(order))]]


def all_but_one(importance: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Every head but the one that matters most in its layer."""
    return [(name, head) for name, one in importance.items() for head in range(len(one)) if head != int(one.argmax())]


def turn(gates: PatchHandle, heads: Sequence[tuple[str, int]], value: float) -> None:
    with torch.no_grad():
        for name, head in heads:
            gates.new_parameters[gates.names.index(name)][head] = value


if __name__ == "__main__":
    main()
