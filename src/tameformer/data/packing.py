"""Documents packed whole into fixed windows, so that little is padding and none is torn that fits.

Best-fit decreasing packing as in Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830):
a document longer than a window is cut into full windows and one remainder; remainders and short documents are placed,
longest first, into the fullest window that still has room. How many windows that takes depends on lengths only, so
every epoch has the same number, while which document goes where, and where long ones are cut, is drawn for each epoch.

Differs from the usual concatenation: no attention and no prediction crosses documents, and every token of a document,
its first included, is predicted exactly once, from a begin token; so a loss in nats divides by bytes honestly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tameformer.data.keys import SampleKeys
from tameformer.data.randomness import uniforms
from tameformer.data.text import num_bytes
from tameformer.data.tokenizers import BPETokenizer
from tameformer.data.windows import IGNORED
from tameformer.errors import DataError
from tameformer.shapes import Int64, Integer

NO_DOCUMENT = -1


class PackedDocuments:
    """Windows of documents for language modelling.

    Of each document the model reads begin, t0, ..., t(n-1) and is to predict t0, ..., t(n-1), end. A document longer
    than a window goes on in other windows, without memory of what came before the cut.

    Example:
        >>> packed = PackedDocuments([np.array([7, 8]), np.array([9])], context=5, begin_id=1, end_id=2)
        >>> batch = packed.fetch(SampleKeys(0, 0, np.array([0])))
        >>> batch["tokens"].tolist(), batch["targets"].tolist()
        ([[1, 7, 8, 1, 9]], [[7, 8, 2, 9, 2]])
        >>> batch["documents"].tolist(), batch["positions"].tolist(), batch["num_items"]
        ([[0, 0, 0, 1, 1]], [[0, 1, 2, 0, 1]], 5)
    """

    def __init__(
        self,
        documents: Sequence[Integer[np.ndarray, " tokens"]],
        context: int,
        *,
        begin_id: int,
        end_id: int,
        padding_id: int = 0,
        total_bytes: int | None = None,
        salt: str = "packing",
    ):
        """Documents of token ids without special tokens.

        Args:
            documents: Ids of each document; may be empty, then only its end is predicted.
            context: Tokens in a window.
            begin_id: First input of every document; may be `end_id`, the convention of GPT-2.
            end_id: Last target of every document.
            padding_id: Input after the last document of a window.
            total_bytes: UTF-8 bytes of all documents, if known.
            salt: Distinguishes several sources that share a data seed.

        Raises:
            DataError: No documents.
        """
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        if not len(documents):
            raise DataError("expected at least one document to pack, got none")
        self.context, self.padding_id, self.total_bytes = context, padding_id, total_bytes
        self._salt = salt
        begin, end = np.array([begin_id]), np.array([end_id])
        self._flat = np.concatenate([part for ids in documents for part in (begin, ids, end)]).astype(np.int32)
        self._lengths = np.array([len(ids) + 1 for ids in documents], dtype=np.int64)  # of inputs, as of targets
        self._begins = np.cumsum(self._lengths + 1) - (self._lengths + 1)
        sizes = np.sort(_piece_sizes(self._lengths, context))[::-1]
        self._window_of_rank, self._num_windows = best_fit(sizes, context)
        self._layout: tuple[tuple[int, int], tuple[np.ndarray, ...]] | None = None  # of the epoch asked for last

    @property
    def total_targets(self) -> int:
        """Targets of one pass: all tokens, and one end token a document."""
        return int(self._lengths.sum())

    @property
    def padding_share(self) -> float:
        """Share of the windows' positions that hold no document."""
        return 1.0 - self.total_targets / (self._num_windows * self.context)

    def __len__(self) -> int:
        """Windows in an epoch, the same in every epoch."""
        return self._num_windows

    def fetch(self, keys: SampleKeys) -> dict[str, Tensor | int]:
        """The windows of the keys, each entry (batch, seq) int64.

        `tokens`; `targets` (-100 at padding); `documents`, the number of each position's document (-1 at padding:
        attention is allowed where two numbers are equal, so every position sees at least itself); `positions`, which
        restart at each document (0 at padding); and `num_items`.
        """
        piece_begin, piece_size, piece_document, window_first = self._pieces(keys.seed, keys.epoch)
        first, count = window_first[keys.indices], np.diff(window_first)[keys.indices]
        pieces = np.repeat(first, count) + _ramps(count)
        sizes = piece_size[pieces]
        positions = _ramps(sizes)
        places = np.repeat(piece_begin[pieces], sizes) + positions
        filled = np.add.reduceat(sizes, np.cumsum(count) - count)  # a window has at least one piece
        rows, columns = np.repeat(np.arange(len(keys.indices)), filled), _ramps(filled)
        return {
            "tokens": self._scatter(rows, columns, self._flat[places], self.padding_id),
            "targets": self._scatter(rows, columns, self._flat[places + 1], IGNORED),
            "documents": self._scatter(rows, columns, np.repeat(piece_document[pieces], sizes), NO_DOCUMENT),
            "positions": self._scatter(rows, columns, positions, 0),
            "num_items": len(places),
        }

    def _scatter(self, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, filler: int) -> Tensor:
        """A (batch, seq) tensor with the values at their places and the filler elsewhere."""
        filled = np.full((int(rows[-1]) + 1, self.context), filler, dtype=np.int64)
        filled[rows, columns] = values
        return torch.from_numpy(filled)

    def _pieces(self, seed: int, epoch: int) -> tuple[np.ndarray, ...]:
        """Where each piece of an epoch begins in the stream, its size, its document; and each window's first piece."""
        if self._layout is None or self._layout[0] != (seed, epoch):
            self._layout = (seed, epoch), self._arrange(seed, epoch)
        return self._layout[1]

    def _arrange(self, seed: int, epoch: int) -> tuple[np.ndarray, ...]:
        """Cut and place: pieces sorted by size, those of one size in random order, into the windows of their ranks."""
        documents = np.arange(len(self._lengths), dtype=np.int64)
        cuts = uniforms(SampleKeys(seed, epoch, documents), 1, self._salt + "/cut")[:, 0]
        counts = -(-self._lengths // self.context)
        remainders = (self._lengths - 1) % self.context + 1
        short_at = (cuts * counts).astype(np.int64)  # which of a document's pieces is the remainder
        document, number = np.repeat(documents, counts), _ramps(counts)
        is_short = number == short_at[document]
        size = np.where(is_short, remainders[document], self.context)
        offset = number * self.context - np.where(number > short_at[document], self.context - remainders[document], 0)
        noise = uniforms(SampleKeys(seed, epoch, np.arange(len(size), dtype=np.int64)), 1, self._salt + "/place")[:, 0]
        by_size = np.lexsort((noise, -size))
        by_window = by_size[np.argsort(self._window_of_rank, kind="stable")]
        window_first = np.concatenate(([0], np.cumsum(np.bincount(self._window_of_rank, minlength=self._num_windows))))
        begin = self._begins[document] + offset
        return begin[by_window], size[by_window], document[by_window], window_first


def pack_texts(
    texts: Sequence[str], tokenizer: BPETokenizer, context: int, *, salt: str = "packing"
) -> PackedDocuments:
    """The texts tokenised and packed, their bytes counted: exp(total loss in nats / `total_bytes`) is per byte."""
    return PackedDocuments(
        tokenizer.encode_batch(texts),
        context,
        begin_id=tokenizer.begin_id,
        end_id=tokenizer.end_id,
        padding_id=tokenizer.padding_id,
        total_bytes=sum(num_bytes(text) for text in texts),
        salt=salt,
    )


def best_fit(sizes: Integer[np.ndarray, " pieces"], capacity: int) -> tuple[Int64[np.ndarray, " pieces"], int]:
    """The bin of each piece, and the number of bins: each goes into the fullest bin with room, else into a new one.

    Args:
        sizes: In [1, capacity]; largest first, the count is at most 11/9 of the best possible, plus one.
        capacity: Of a bin.

    Example:
        >>> bins, count = best_fit(np.array([4, 3, 2, 1]), capacity=5)
        >>> bins.tolist(), count
        ([0, 1, 1, 0], 2)
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # by room left
    rooms = 0  # bit r is set while a bin with room r is open: its lowest bit at or above a size is the best fit
    count = 0
    for index, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen, count = capacity, count, count + 1
        bins[index] = chosen
        if room > size:
            open_bins[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins, count


def _piece_sizes(lengths: np.ndarray, context: int) -> np.ndarray:
    """Sizes of all pieces: full windows, and one remainder in [1, context] a document."""
    full = (lengths - 1) // context
    return np.concatenate([np.full(int(full.sum()), context), (lengths - 1) % context + 1])


def _ramps(counts: np.ndarray) -> np.ndarray:
    """0, ..., n-1 for each n, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - counts, counts)
