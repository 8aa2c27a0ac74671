"""Keys and values kept between the steps of a generation.

Self-attention appends to its cache at each step. Cross-attention fills its own once, from a memory that does not
change, and reads it afterwards.
"""

from torch import Tensor

from tameformer.shapes import Float, Int


class AttentionCache:
    """Keys and values of one attention layer, in a buffer that doubles when it is full.

    Attributes:
        length: positions held.
    """

    def __init__(self) -> None:
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(
        self, key: Float[Tensor, "batch kv_heads new head_dim"], value: Float[Tensor, "batch kv_heads new value_dim"]
    ) -> tuple[Float[Tensor, "batch kv_heads key head_dim"], Float[Tensor, "batch kv_heads key value_dim"]]:
        """Adds positions at the end; returns all keys and values held, as views that the next call may overwrite."""
        start, self.length = self.length, self.length + key.shape[2]
        self._key = _with_room(self._key, key, start, self.length)
        self._value = _with_room(self._value, value, start, self.length)
        self._key[:, :, start : self.length] = key
        self._value[:, :, start : self.length] = value
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values held.

        Raises:
            ValueError: nothing was appended yet.
        """
        if self._key is None or self._value is None:
            raise ValueError("expected a cache that holds something, got an empty one; call append first")
        return self._key[:, :, : self.length], self._value[:, :, : self.length]

    def select(self, rows: Int[Tensor, " rows"]) -> None:
        """Keeps the given batch rows, in that order; a row may be named several times (the beams of a beam search)."""
        if self._key is not None and self._value is not None:
            self._key, self._value = self._key.index_select(0, rows), self._value.index_select(0, rows)


class StackCache:
    """The caches of a stack of layers: `own[i]` for the self-attention of layer i, `memory[i]` for its cross-attention.

    Example:
        >>> StackCache(num_layers=2).length
        0
    """

    def __init__(self, num_layers: int):
        self.own = [AttentionCache() for _ in range(num_layers)]
        self.memory = [AttentionCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Positions generated or read so far."""
        return self.own[0].length

    def select(self, rows: Int[Tensor, " rows"], *, same_memory: bool = False) -> None:
        """Keeps the given batch rows in every layer.

        `same_memory=True` leaves the cross-attention alone: right when each row moves among rows of one source.
        """
        for cache in self.own if same_memory else self.own + self.memory:
            cache.select(rows)


def _with_room(buffer: Tensor | None, new: Tensor, start: int, end: int) -> Tensor:
    """`buffer`, or a larger one with the first `start` positions copied, that holds `end` positions."""
    if buffer is None:
        return new.new_empty(*new.shape[:2], end, new.shape[3])
    if buffer.shape[2] >= end:
        return buffer
    larger = buffer.new_empty(*buffer.shape[:2], max(end, 2 * buffer.shape[2]), buffer.shape[3])
    larger[:, :, :start] = buffer[:, :, :start]
    return larger
