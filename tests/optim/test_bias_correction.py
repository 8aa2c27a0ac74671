"""The Adam that BERT was released with leaves the bias of its moments as it is; none of ours does."""

import pytest
import torch
from torch import nn

from tameformer.optim import OptimConfig, optimizers


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_first_step_is_one_learning_rate_long(name, betas):
    """Without correction it would be (1 - beta1) / sqrt(1 - beta2) rates: 3.16 or 0.45 (Zhang et al. 2021, section 3)."""
    layer = nn.Linear(4, 4)
    (optimizer,) = optimizers(layer, OptimConfig(name=name, peak_lr=0.01, betas=betas, weight_decay=0.0))
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(4, 4)
    optimizer.step()
    steps = (layer.weight.detach() - before).abs()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01), rtol=1e-3, atol=0)
