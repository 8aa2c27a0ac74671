"""The moving average of a model's weights: torch's `AveragedModel`, without its wait for the device."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, beside the model; `advance` moves it.

    Args:
        model: On its device already.
        decay: What the average keeps of itself at each step.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = averaged(model, 0.5)
        >>> for value in (0.0, 1.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     advance(average, model)
        >>> average.module.weight.item()
        0.5
    """
    # Buffers are averaged, too: for Transformers they are constants.
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@torch.no_grad()
def advance(average: AveragedModel, model: nn.Module) -> None:
    """Take the model's present weights in; the first time they are the average.

    The same numbers as `average.update_parameters(model)`, which copies its count of steps to the device each time, and waits
    there for all work before it.
    """
    if average.n_averaged == 0:
        average.update_parameters(model)
        return
    pairs = [
        pair
        for mine, its in (
            (average.module.parameters(), model.parameters()),
            (average.module.buffers(), model.buffers()),
        )
        for pair in zip(mine, its, strict=True)
    ]
    for is_float in (True, False):
        alike = [(mine.detach(), its.detach()) for mine, its in pairs if mine.is_floating_point() == is_float]
        if alike and average.multi_avg_fn is not None:
            mine, its = zip(*alike, strict=True)
            average.multi_avg_fn(mine, its, average.n_averaged)
    average.n_averaged += 1
