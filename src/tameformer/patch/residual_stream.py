"""The residual stream of a forward pass, followed by the identity of tensors through anyone's layers."""

from typing import Any

from torch import Tensor


class ResidualStream:
    """What is known of the stream while a forward pass runs. It is followed inside layers only."""

    def __init__(self) -> None:
        self.blocks: list[str] = []
        """The layers that are running, innermost last."""
        self._tensors: dict[
            int, Tensor
        ] = {}  # the stream and its normalized sums; held, so that no identity comes again
        self._sums: dict[int, Tensor] = {}
        self._named: set[str] = set()
        self._branches = 0  # sums in the present layer so far

    def enter(self, block: str, tensor: Tensor | None) -> None:
        """A layer begins with this stream."""
        self.blocks.append(block)
        self._branches = 0
        if tensor is not None:
            self._tensors[id(tensor)] = tensor

    def leave(self) -> None:
        """The innermost layer ends."""
        self.blocks.pop()
        self.clear()

    def clear(self) -> None:
        """Hold no tensor any more."""
        self._tensors.clear()
        self._sums.clear()

    def summands(self, args: Any) -> tuple[Tensor, Tensor] | None:
        """The stream and the branch, where these arguments of a sum are one of each."""
        pair = args[:2] if len(args) > 1 and all(isinstance(arg, Tensor) for arg in args[:2]) else None
        places = [id(arg) in self._tensors for arg in pair] if pair and self.blocks else []
        if pair is None or places.count(True) != 1 or pair[0].shape != pair[1].shape:
            return None
        return pair if places[0] else pair[::-1]

    def continue_with(self, total: Tensor) -> None:
        """The stream goes on from the sum."""
        self._tensors[id(total)] = self._sums[id(total)] = total

    def after_norm(self, args: Any, output: Tensor) -> None:
        """Post-norm: the stream goes on from the norm of a sum."""
        if args and id(args[0]) in self._sums:
            self._tensors[id(output)] = output

    def name_branch(self, running: str, finished: str | None) -> str:
        """A name for the branch that is being added, its own in this pass.

        Args:
            running: The module that adds.
            finished: The one that ended last directly inside it, which says more where it is the layer that adds.
        """
        block = self.blocks[-1]
        self._branches += 1
        name = running if running != block else finished or ""
        if name in self._named or not name.startswith(f"{block}."):
            name = f"{block}.branch_{self._branches}"
        self._named.add(name)
        return name


def stream_in(args: Any, kwargs: Any) -> Tensor | None:
    """The first (batch, seq, dim) of floats that a layer was called with."""
    return next(filter(_is_stream, [*args, *kwargs.values()]), None)


def stream_out(output: Any) -> Tensor | None:
    """The first (batch, seq, dim) of floats that a layer returned."""
    values = output if isinstance(output, (tuple, list)) else output.values() if isinstance(output, dict) else [output]
    return next(filter(_is_stream, values), None)


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested and value.dim() == 3 and value.is_floating_point()
