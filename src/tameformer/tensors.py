"""What kind of tensor it is that one has, and what its device can do."""

import torch
from torch import Tensor, nn


def is_ordinary(tensor: Tensor) -> bool:
    """Whether it is torch's own kind of tensor; of another kind, such as a sharded one, this process may hold a part only.

    Example:
        >>> is_ordinary(torch.ones(2)), is_ordinary(nn.Parameter(torch.ones(2)))
        (True, True)
    """
    return type(tensor) in (Tensor, nn.Parameter)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor where each process holds a part of it (FSDP2), and every one of them must call; else itself.

    Example:
        >>> gathered(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of it: the part of a sharded tensor, as a view, another one itself.

    Example:
        >>> local_part(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold a part of it only.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return hasattr(tensor, "full_tensor")


def widest(device: torch.device) -> torch.dtype:
    """The floating type to be exact in: float64, or float32 on accelerators that lack it, as Apple's and some of Intel's do.

    Example:
        >>> widest(torch.device("cpu")), widest(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def pins(device: torch.device | None) -> bool:
    """Whether copies to and from the device gain by page-locked memory of the processor; None is no accelerator.

    Apple's accelerators share the processor's memory, and torch puts page-locked tensors on the wrong device there
    (pytorch/pytorch #86060, #181374).

    Example:
        >>> pins(None), pins(torch.device("mps")), pins(torch.device("cuda"))
        (False, False, True)
    """
    return device is not None and device.type not in ("cpu", "mps")
