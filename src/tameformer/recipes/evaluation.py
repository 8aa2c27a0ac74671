"""What the evaluations of all tasks share: one pass over held-out data, and what is made of its sums."""

import math
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.data import Plan, SampleKeys, Source, single_pass
from tameformer.training import Engine, mean_metrics
from tameformer.training.evaluate import Measure
from tameformer.training.run import Evaluation
from tameformer.training.step import Batch

_LARGEST_EXPONENT = 700.0  # beyond it a float is infinite


def one_pass(engine: Engine, model: nn.Module, source: Source, plan: Plan, measure: Measure) -> dict[str, float]:
    """The mean per target of each metric, over the samples of the plan's first epoch; all processes share the work."""
    batches = single_pass(source, plan, rank=engine.rank, world_size=engine.world_size)
    return mean_metrics(engine, model, batches, measure)


def placed_batches(engine: Engine, source: Source, plan: Plan) -> Iterator[tuple[SampleKeys, Batch]]:
    """This process's batches of such a pass on its device, with their keys, where something is told of each sample."""
    for step in range(engine.rank, plan.steps_in_epoch(0), engine.world_size):
        keys = plan.batch(step)
        yield keys, engine.place(source.fetch(keys))


def joined(*evaluations: Evaluation) -> Evaluation:
    """One after the other; their metrics together."""

    def evaluation(engine: Engine, model: nn.Module) -> dict[str, float]:
        return {key: value for each in evaluations for key, value in each(engine, model).items()}

    return evaluation


def class_sums(logits: Tensor, labels: Tensor) -> Mapping[str, Tensor]:
    """Cross-entropy and right answers, summed over the samples."""
    logits = logits.float()
    return {
        "loss": F.cross_entropy(logits, labels, reduction="sum"),
        "accuracy": (logits.argmax(-1) == labels).sum(),
    }


def token_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy summed over the targets that count: all but those that are -100.

    Example:
        >>> import torch
        >>> token_loss(torch.zeros(1, 3, 4), torch.tensor([[2, 0, -100]]))  # 2 log 4
        tensor(2.7726)
    """
    return F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        reduction="sum",
        ignore_index=-100,
        label_smoothing=label_smoothing,
    )


def perplexity(loss: float) -> float:
    """exp(loss in nats), finite after a divergence, too."""
    return math.exp(min(loss, _LARGEST_EXPONENT))
