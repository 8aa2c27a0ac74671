"""An accelerator that is not there: its tensors live on the processor, and it takes itself seriously.

Tensors of different devices do not mix on it, it has no float64, and it knows who waits for it: who reads a number, copies to
or from it without `non_blocking`, or selects by a mask, whose length nobody knows before. That is what a GPU punishes with an
error or with milliseconds, so code that runs here, and waits nowhere, has its tensors where they belong. It says nothing of
GPU kernels.

It changes the process that it is installed in for good (there is one third-party device per process): use a process of its own.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import PartialState
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tameformer import tensors
from tameformer.optim import clipping
from tameformer.probes import gradients, spectral_norm, update_ratio

aten = torch.ops.aten
DEVICE = "simulated"
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_LENGTH_UNKNOWN = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

_kept: list[torch.library.Library] = []
waits: Counter[str] = Counter()
"""How often each line of ours waited for the device."""


class SimulatedTensor(Tensor):
    """A tensor of the device, round one of the processor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{DEVICE} has no {inner.dtype}, as Apple's accelerators have none")
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=f"{DEVICE}:0",
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        _wait("tolist")
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = SimulatedTensor(self.inner.detach().clone())
        kept = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo.setdefault(id(self), kept)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu()")

    def pin_memory(self, *args: Any) -> Any:
        raise RuntimeError("only dense CPU tensors can be pinned")


def _wait(what: str) -> None:
    places = [f for f in traceback.extract_stack() if "/tameformer/" in f.filename]
    where = f"{places[-1].filename.partition('/tameformer/')[2]}: {places[-1].line}" if places else "elsewhere"
    waits[f"{what} at {where}"] += 1


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the device does with an operation of torch."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, SimulatedTensor)}
    is_target = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE
    if not ours and not is_target:
        return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    if func is aten._to_copy.default:
        return _moved(args[0], kwargs)
    if func is aten.copy_.default:
        return _copied(*args, **kwargs)
    if func is aten._pack_padded_sequence.default:  # which wants the lengths on the processor
        packed, sizes = func(args[0].inner, *args[1:], **kwargs)
        return SimulatedTensor(packed), sizes
    if func is aten._pack_padded_sequence_backward.default:
        return SimulatedTensor(func(args[0].inner, *args[1:], **kwargs))
    if func is aten._fused_sdp_choice.default:
        return 0  # attention in its plain form
    guests = [tensor for tensor in tensors if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0]
    if guests and func in _INDEXING:
        _wait("index copied to the device")
    elif guests:
        shapes_of_guests = ", ".join(str(tuple(guest.shape)) for guest in guests)
        raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, got {shapes_of_guests} on the processor")
    if func in _READS:
        _wait("number read")
    elif func in _LENGTH_UNKNOWN or (func in _INDEXING and any(_is_mask(one) for one in args[1] or [])):
        _wait("length asked for")
    args, kwargs = tree_map(_inside, args), tree_map(_inside, kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    output = func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    if func in _READS:
        return output
    return tree_map(lambda leaf: _outside(leaf, ours) if isinstance(leaf, Tensor) else leaf, output)


def _moved(tensor: Tensor, kwargs: dict[str, Any]) -> Tensor:
    was_here, to = isinstance(tensor, SimulatedTensor), kwargs.get("device")
    is_here = was_here if to is None else torch.device(to).type == DEVICE
    if was_here != is_here and not kwargs.get("non_blocking"):
        _wait("copied to the device" if is_here else "copied to the processor")
    settings = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    copy = aten._to_copy.default(_inside(tensor), **settings)
    return SimulatedTensor(copy) if is_here else copy


def _copied(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, SimulatedTensor) != isinstance(source, SimulatedTensor) and not non_blocking:
        _wait("copied")
    _inside(target).copy_(_inside(source))
    return target


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _inside(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, SimulatedTensor) else leaf


def _outside(tensor: Tensor, known: dict[int, SimulatedTensor]) -> Tensor:
    return known[id(tensor)] if id(tensor) in known else SimulatedTensor(tensor)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """`torch.tensor(..., device=...)` makes its copy behind the back of other modes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        is_target = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == DEVICE
        if is_target and func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Event:
    """Of which only the waiting matters."""

    def __init__(self, device: Any = None) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        _wait("event")


class _Module:
    """What torch asks of `torch.simulated`."""

    def __init__(self) -> None:
        self._seed = torch.zeros(1, dtype=torch.int64)

    is_initialized = is_available = lambda self: True
    current_device = lambda self: 0  # noqa: E731
    device_count = lambda self: 1  # noqa: E731
    _is_in_bad_fork = lambda self: False  # noqa: E731

    def manual_seed(self, seed: int) -> None:
        """Random numbers are drawn on the processor."""

    manual_seed_all = manual_seed

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        _wait("synchronize")

    def empty_cache(self) -> None:
        """There is none."""


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, SimulatedTensor)


def install() -> None:
    """Make it the accelerator of this process."""
    # Autocast to bf16 is allowed and changes nothing.
    _kept.append(torch.library.Library("_", "IMPL", "AutocastPrivateUse1"))
    _kept[0].fallback(torch.library.fallthrough_kernel)
    _setup_privateuseone_for_python_backend(DEVICE, _Module())
    torch.Event = _Event  # pyright: ignore
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects they are, as with a GPU
    PartialState.default_device = property(lambda self: torch.device(DEVICE))  # pyright: ignore
    pin: Callable[..., Tensor] = lambda self, *args: self  # noqa: E731
    Tensor.pin_memory = pin  # pyright: ignore
    for module in (tensors, clipping, gradients, spectral_norm, update_ratio):
        module.is_ordinary = _is_ordinary


@contextmanager
def simulated() -> Iterator[Counter[str]]:
    """Operations inside know the device; gives the count of what waited for it."""
    waits.clear()
    with _Factories(), _Operations():
        yield waits
