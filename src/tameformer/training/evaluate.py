"""Means over held-out data: every target counts once, over all batches and processes."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from tameformer.tensors import widest
from tameformer.training.engine import Engine
from tameformer.training.step import Batch

Measure = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""From a batch on the device to sums over its `num_items` targets, by metric."""


def mean_metrics(engine: Engine, model: nn.Module, batches: Iterable[Batch], measure: Measure) -> dict[str, float]:
    """The mean per target of each metric; sums are kept on the device, in float64 where it has that, and read once.

    Args:
        engine: Device and processes.
        model: In evaluation mode; not wrapped, because processes may have different numbers of batches.
        batches: This process's share; the shares of all processes together hold each sample once.
        measure: Sums of one batch.

    Raises:
        ValueError: There is nothing to measure.
    """
    totals: dict[str, Tensor] = {}
    num_items = 0
    for batch in batches:
        for name, value in measure(model, engine.place(batch)).items():
            value = value.to(widest(value.device))
            totals[name] = totals[name] + value if name in totals else value
        num_items += batch["num_items"]
    names = sorted(set(engine.gather(list(totals))))
    if not names:
        raise ValueError("there is no held-out data to evaluate on; give some, or evaluate on fewer processes")
    zero = torch.zeros((), dtype=widest(engine.device), device=engine.device)
    sums = torch.stack([*(totals.get(name, zero) for name in names), zero + num_items])
    *values, count = engine.sum_tensor(sums).tolist()
    return {name: value / count for name, value in zip(names, values, strict=True)}
