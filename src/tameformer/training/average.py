"""The moving average of a model's weights: torch's `AveragedModel`, without its wait for the device."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tameformer.tensors import local_part


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights, beside the model; `advance` moves it.

    Args:
        model: Whole: what is shared out over processes cannot be copied; share the average out, too.
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
    there for all work before it; and parts of weights that are shared out over processes, which it does not know.

    Args:
        average: What `averaged` returned.
        model: May have more buffers by now, such as those of `prior_decay`: they are no part of the average.
    """
    states: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    pairs = [
        (local_part(mine.detach()), local_part(states[name].detach()))
        for named in (average.module.named_parameters(), average.module.named_buffers())
        for name, mine in named
    ]
    for is_float in (True, False):
        alike = [pair for pair in pairs if pair[0].is_floating_point() == is_float]
        if alike and average.n_averaged == 0:
            for mine, its in alike:
                mine.copy_(its)
        elif alike and average.multi_avg_fn is not None:
            mine, its = zip(*alike, strict=True)
            average.multi_avg_fn(mine, its, average.n_averaged)
    average.n_averaged += 1
