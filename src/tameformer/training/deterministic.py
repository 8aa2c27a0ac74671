"""The same bits each time, also on a GPU."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tameformer.errors import DeterminismError

_NONE = re.compile(r"(\S+) does not have a deterministic implementation")
"""How torch refuses; it has no error class of its own for it."""


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, if it is wanted, torch takes kernels that give the same bits each time, and refuses what has none.

    A processor's kernels are deterministic as they are. On a GPU some add in whatever order they come to it; those that do not
    are slower. cuBLAS reads how much memory it may set aside when it is first used in the process.

    Args:
        wanted: Else nothing changes.

    Raises:
        DeterminismError: From inside, where an operation has no such kernel; it is named.

    Example:
        >>> with deterministic_kernels(True):
        ...     print(torch.are_deterministic_algorithms_enabled())
        True
        >>> torch.are_deterministic_algorithms_enabled()
        False
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a safeguard for code that reads what it never wrote
    try:
        yield
    except RuntimeError as error:
        refused = _NONE.search(str(error))
        if refused is None:
            raise
        raise DeterminismError(
            f"expected kernels that give the same bits each time, and torch has none for {refused[1]} on this device; drop "
            "--deterministic, and the same seed gives the same run but for rounding"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
