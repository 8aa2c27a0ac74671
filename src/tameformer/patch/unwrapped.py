"""The model behind what torch wraps around it: compiled graphs and copies for several devices."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and `DistributedDataParallel`, whose names are those of a checkpoint."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled code eagerly meanwhile: a compiled graph calls no hooks; what was compiled stays."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
