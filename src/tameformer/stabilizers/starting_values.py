"""Starting values as a patch: weights written once, and put back bit for bit as long as nobody has trained them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tameformer.errors import PatchError

Write = Callable[[Tensor], object]
"""Writes a tensor in place, from what is there; the same each time."""


@dataclass(frozen=True)
class Start:
    """A new starting value for a stored weight, or for some rows of it."""

    owner: nn.Module
    """Whose weight."""
    name: str
    """The weight's name there."""
    view: Tensor
    """What of it is written."""
    write: Write


def times(factor: float) -> Write:
    """Multiplies.

    Example:
        >>> times(0.5)(torch.tensor([4.0]))
        tensor([2.])
    """
    return lambda tensor: tensor.mul_(factor)


def xavier_normal(gain: float = 1.0) -> Write:
    """Draws anew, normal with deviation gain * sqrt(2 / (in + out)); the seed comes from torch's global generator, now."""
    seed = int(torch.randint(2**62, ()))

    def write(tensor: Tensor) -> None:
        generator = torch.Generator(tensor.device).manual_seed(seed)
        nn.init.xavier_normal_(tensor, gain=gain, generator=generator)

    return write


def write_starts(undo: ExitStack, starts: Sequence[Start], method: str) -> None:
    """Write the values, a tied weight once.

    Undone, a weight that nobody has written since has its former value exactly. One that was trained or loaded keeps what it
    has: taking the start back would take the training's work back too. Copies of the weights are held until then.

    Raises:
        PatchError: The method has written starting values of an owner before.
    """
    mark = _mark(method)
    for owner in _owners(starts):
        if getattr(owner, mark, False):
            raise PatchError(f"{method} has written weights of {type(owner).__name__} already; remove or bake it first")
        object.__setattr__(owner, mark, True)
        undo.callback(object.__delattr__, owner, mark)
    for stored, parts in _by_weight(starts):
        undo.callback(_put_back, stored, stored.detach().clone(), parts)
        _write(stored, parts)


def keep_starts(starts: Sequence[Start], method: str) -> None:
    """Take the marks off and keep the values."""
    for owner in _owners(starts):
        object.__delattr__(owner, _mark(method))


@dataclass(frozen=True)
class _Part:
    """What is written in a stored weight, by its geometry there."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    write: Write


def _by_weight(starts: Sequence[Start]) -> list[tuple[Tensor, list[_Part]]]:
    """What is written in each stored weight, each place once."""
    found: dict[int, tuple[Tensor, dict[object, _Part]]] = {}
    for start in starts:
        stored, view = getattr(start.owner, start.name), start.view
        place = (tuple(view.shape), view.stride(), view.storage_offset() - stored.storage_offset())
        found.setdefault(id(stored), (stored, {}))[1].setdefault(place, _Part(*place, start.write))
    return [(stored, list(parts.values())) for stored, parts in found.values()]


@torch.no_grad()
def _write(tensor: Tensor, parts: Sequence[_Part]) -> None:
    for part in parts:
        part.write(tensor.as_strided(part.size, part.stride, tensor.storage_offset() + part.offset))


@torch.no_grad()
def _put_back(stored: Tensor, before: Tensor, parts: Sequence[_Part]) -> None:
    before = before.to(stored)
    written = before.clone()
    _write(written, parts)
    if torch.equal(written, stored):
        stored.copy_(before)


def _mark(method: str) -> str:
    return f"_started_by_{method}"


def _owners(starts: Sequence[Start]) -> list[nn.Module]:
    return list({id(start.owner): start.owner for start in starts}.values())
