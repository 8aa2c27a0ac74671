"""Memory that runs out in a step: how to tell, and the same batch in smaller parts.

Losses are sums over targets, divided by the targets of the whole step, so that a batch in parts gives the same gradient to
rounding. What a forward pass draws (dropout) it draws anew, as with `gradient_accumulation_steps`; what it takes from the
whole batch (the statistics of a batch norm) it takes from each part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Batch = Mapping[str, Any]

# The processor's allocator and cuBLAS have no error class of their own.
_TOLD = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device.

    Example:
        >>> try:
        ...     torch.empty(2**62, dtype=torch.uint8)
        ... except RuntimeError as error:
        ...     is_out_of_memory(error), is_out_of_memory(RuntimeError("another one"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _TOLD)


def num_rows(batch: Batch) -> int:
    """Samples in a batch: the common first dimension of its tensors."""
    return max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), default=1)


def in_parts(batch: Batch, parts: int) -> Sequence[Batch]:
    """A batch as several of about equal size, in order; no more than it has samples.

    `num_items` of a part is its share by samples, so that those of all parts add up.

    Example:
        >>> batch = {"images": torch.zeros(5, 2), "scale": torch.tensor(1.0), "num_items": 5}
        >>> [(len(part["images"]), part["num_items"]) for part in in_parts(batch, 2)]
        [(3, 3.0), (2, 2.0)]
    """
    rows = num_rows(batch)
    parts = min(parts, rows)
    if parts == 1:
        return [batch]
    cut = {
        key: value.tensor_split(parts)
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == rows
    }
    sizes = [len(part) for part in torch.empty(rows, 0).tensor_split(parts)]
    return [
        {
            **batch,
            **{key: pieces[number] for key, pieces in cut.items()},
            "num_items": batch["num_items"] * size / rows,
        }
        for number, size in enumerate(sizes)
    ]
