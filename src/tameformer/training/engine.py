"""The adapter to accelerate: device, processes, DDP, gathering. Nothing else of accelerate is used.

Accelerate's own loaders, samplers, schedulers and `save_state` do not restore the order of samples after a resume, so the
loop brings its own. Precision is applied here by plain autocast, because accelerate's wrapper copies every output to fp32.
"""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tameformer.training.sharding import is_shared_out


class Engine:
    """One process's view of the device and of the other processes.

    Under `torchrun --nproc_per_node N` the processes find each other; on a machine without a GPU they talk over gloo.

    Args:
        autocast_dtype: Half-precision type of matrix products, or None for full precision; may be changed until `prepare`.
    """

    def __init__(self, *, autocast_dtype: torch.dtype | None = None) -> None:
        self._accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.device: torch.device = self._accelerator.device
        self.rank: int = self._accelerator.process_index
        self.world_size: int = self._accelerator.num_processes
        self.autocast_dtype = autocast_dtype
        self.batches_placed = 0
        """Batches that came to the device so far: whoever wants to know whether the run goes on looks here."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run folder."""
        return self._accelerator.is_main_process

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model on this process's device; wrapped to average gradients, unless sharing it out has seen to that."""
        if is_shared_out(model):
            return model
        # Buffers are not broadcast: they are functions of the parameters or constants, equal on all ranks already.
        # Left to decide on the placement, accelerate imports torch's distributed tensors to see whether the model has any.
        return cast(nn.Module, self._accelerator.prepare_model(model, device_placement=True))

    def seed(self, value: int) -> None:
        """Seed what this process draws on its device, and on the CPU.

        The generators are asked directly: `torch.manual_seed` spends 0.1 ms on devices that are not used.
        """
        torch.default_generator.manual_seed(value)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(value)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Around a backward pass: DDP exchanges gradients in the last one of a step only.

        FSDP2 does in each: it would have to keep whole gradients meanwhile, and not to keep them is what it is for.
        """
        if last or self.world_size == 1 or is_shared_out(model):
            return nullcontext()
        return self._accelerator.no_sync(model)

    def place(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on this process's device; copies do not wait when the source is pinned."""
        self.batches_placed += 1
        return {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all processes, exact for whole numbers below 2^53."""
        if self.world_size == 1:
            return list(values)
        return self.sum_tensor(torch.tensor(values, dtype=torch.float64, device=self.device)).tolist()

    def sum_tensor(self, values: Tensor) -> Tensor:
        """The tensor summed over all processes."""
        return values if self.world_size == 1 else cast(Tensor, self._accelerator.reduce(values, reduction="sum"))

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes joined in the order of ranks."""
        if self.world_size == 1:
            return items
        lists: list[list[Any]] = [[] for _ in range(self.world_size)]
        torch.distributed.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def wait(self) -> None:
        """Return when all processes have come here."""
        self._accelerator.wait_for_everyone()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients; its mode comes back afterwards, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def leave(exit_code: int) -> NoReturn:
    """End one of several processes, when all is written, without taking its interpreter down.

    Threads of gloo outlive `destroy_process_group` where DDP or FSDP2 ran. One that gets round to letting go of a tensor while
    the interpreter is being taken down aborts the process, and `torchrun` reports the failure of a run that had ended well:
    rare, but it happens on busy machines (https://github.com/pytorch/pytorch/issues/190489).

    Args:
        exit_code: Of the process.
    """
    torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()  # as `multiprocessing` does before it leaves a child: data workers end, logs are written
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
