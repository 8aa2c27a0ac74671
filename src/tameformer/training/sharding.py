"""Weights shared out over the processes (FSDP2): each keeps its part of every weight, gradient and moment.

A layer's weights are whole on a process only while it runs forward or backward. That costs two exchanges of the weights a
micro-batch more than DDP, and saves all but one part of the memory that does not grow with the batch.

References:
    Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv:2304.11277;
    Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054, stage 3.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tameformer.errors import ConfigError
from tameformer.patch.blocks import blocks


def share_out(model: nn.Module, *, device: torch.device) -> None:
    """Leave this process its part of each weight; before the optimizers are built, which hold those parts then.

    Each layer (`tameformer.patch.blocks`) is gathered by itself, what is outside of layers together.

    Args:
        model: Whole, and the same on all processes.
        device: Of this process.

    Raises:
        ConfigError: A parameter without dimensions, which cannot be cut.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    single = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
    if single:
        raise ConfigError(f"fsdp: {single[0]} is a single number without dimensions, which FSDP2 cannot cut; use DDP")
    model.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    layers = blocks(model)
    members = Counter(name.rpartition(".")[0] for name in layers)
    for name, layer in layers.items():
        # One alone may be applied again and again, on each process as often as its batch wants (a Universal Transformer).
        if members[name.rpartition(".")[0]] > 1:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_shared_out(model: nn.Module) -> bool:
    """Whether `share_out` was called on the model; asked in every step, and without importing torch's FSDP2."""
    return hasattr(model, "reshard")


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights are whole on every process inside: each may run what it likes, as often as it likes, and nobody waits.

    For evaluation, where processes have different numbers of batches. Gives an ordinary model nothing to do.
    """
    if not is_shared_out(model):
        yield
        return
    parts = [cast(Any, module) for module in model.modules() if is_shared_out(module)]
    cast(
        Any, model
    )._get_fsdp_state()._lazy_init()  # torch does it in the first forward pass; evaluation may come before
    with ExitStack() as undo:
        for part in parts:
            part.unshard()
            undo.callback(part.reshard)
            # FSDP2's hooks would note the order of these passes, which the next backward pass follows in what it gathers ahead:
            # on processes that had different passes, each would wait for another weight.
            state = part._get_fsdp_state()
            undo.enter_context(_resting(state._pre_forward_hook_handle, last=False))
            undo.enter_context(_resting(state._post_forward_hook_handle, last=True))
        yield


@contextmanager
def _resting(handle: RemovableHandle, *, last: bool) -> Iterator[None]:
    """Without a module's hook inside; it comes back as the first or the last, where FSDP2 puts it."""
    hooks: Any = handle.hooks_dict_ref()
    hook = hooks.pop(handle.id)
    try:
        yield
    finally:
        hooks[handle.id] = hook
        hooks.move_to_end(handle.id, last=last)
