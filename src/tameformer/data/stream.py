"""From a plan and a source to this process's micro-batches, the same for any number of workers, processes and parts."""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch.utils.data import DataLoader, Dataset

from tameformer.data.keys import SampleKeys, split
from tameformer.data.plans import Plan
from tameformer.errors import TameError

Batch = dict[str, Any]
"""CPU tensors by name, and `num_items`: how many targets the loss sums over."""


@runtime_checkable
class Source(Protocol):
    """A data set: `fetch` is a pure function of the keys, so every worker and process gets the same sample."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def fetch(self, keys: SampleKeys) -> Batch:
        """The samples of these keys, in their order."""
        ...


def stream(
    source: Source,
    plan: Plan,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[list[Batch], None, None]:
    """For each optimizer step in [start, stop), the `accumulation` micro-batches of process `rank`.

    Joining the micro-batches over parts, then over ranks, gives the plan's global batch of the step in its order.
    Any start costs the same. Worker processes live as long as the iterator; close it, or drop it, to end them.

    Args:
        source: where samples come from.
        plan: which samples each step sees.
        start: first step, from 0.
        stop: the step after the last.
        rank: number of this process.
        world_size: number of processes.
        accumulation: micro-batches per step and process.
        num_workers: processes that fetch ahead; 0 fetches here, when asked.
        pin_memory: page-locked tensors, for copies to a GPU that do not wait.

    Raises:
        DataError: a global batch has fewer samples than there are parts, or the source met bad data.
    """
    _check_process(rank, world_size)
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, got {accumulation}")
    first = rank * accumulation
    keys = (
        part
        for step in range(start, stop)
        for part in split(plan.batch(step), world_size * accumulation)[first : first + accumulation]
    )
    return _grouped(_load(source, keys, num_workers, pin_memory), accumulation)


def single_pass(
    source: Source,
    plan: Plan,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Generator[Batch, None, None]:
    """The plan's first epoch, each batch on one process: process r takes batches r, r + world_size, ...

    With `SequentialBatches` or `LengthSortedBatches` that is every sample once, tail included. A process may see one
    batch fewer than another, or none: count items, do not average means.
    """
    _check_process(rank, world_size)
    keys = (plan.batch(step) for step in range(rank, plan.steps_in_epoch(0), world_size))
    return _load(source, keys, num_workers, pin_memory)


def _check_process(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")


def _grouped(batches: Generator[Batch, None, None], size: int) -> Generator[list[Batch], None, None]:
    with closing(batches):
        for first in batches:
            yield [first, *islice(batches, size - 1)]


def _load(
    source: Source, keys: Iterable[SampleKeys], num_workers: int, pin_memory: bool
) -> Generator[Batch, None, None]:
    if num_workers == 0:  # a plain loop: DataLoader's bookkeeping costs more than a small fetch
        for part in keys:
            batch = source.fetch(part)
            yield _pinned(batch) if pin_memory else batch
        return
    loader: DataLoader[Any] = DataLoader(
        _Fetching(source),
        batch_size=None,  # the sampler's items are whole batches
        sampler=_Keys(keys),
        collate_fn=cast(Any, _identity),  # torch types it for lists of samples
        num_workers=num_workers,
        worker_init_fn=_leave_process_group,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # or the global generator would be advanced
    )
    batches: Any = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, TameError):
                raise batch
            yield batch
    finally:  # private, but an exception's traceback would keep the workers waiting until it is collected
        batches._shutdown_workers()


class _Keys:
    """A sampler whose items are SampleKeys."""

    def __init__(self, keys: Iterable[SampleKeys]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[SampleKeys]:
        return iter(self.keys)


class _Fetching(Dataset):
    """The source as DataLoader wants it; our errors travel as values, so that their message is not wrapped."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, keys: SampleKeys) -> Batch | TameError:
        try:
            return self.source.fetch(keys)
        except TameError as error:
            return error


def _identity(batch: Batch | TameError) -> Batch | TameError:
    return batch


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and signals to the group reach the main process alone, which saves while its workers still serve it."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def _pinned(batch: Batch) -> Batch:
    return {name: value.pin_memory() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
