"""What a residual branch is made of, in models that we did not write."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Placement = Literal["pre", "post", "peri", "none"]
Kind = Literal["attention", "cross_attention", "feed_forward"]
QK_NORMS = ("q_norm", "k_norm")
"""What Qwen3, Gemma 3 and timm call the norms of queries and keys in their attention; so do we."""


@dataclass(frozen=True)
class Matrix:
    """A linear map inside a stored weight: all of it, or the rows that are the map's outputs."""

    name: str
    """Name of the module that owns the weight, in the model."""
    module: nn.Module
    """The owner."""
    weight: str = "weight"
    """Name of the weight in its owner."""
    bias: str | None = "bias"
    """Name of the bias in its owner; None where it has none."""
    start: int | None = None
    """The first output of the stored weight that is this map's."""
    stop: int | None = None
    """The first output after them."""
    is_transposed: bool = False
    """Whether the weight is stored (in, out), as GPT-2's `Conv1D` does."""

    def view(self) -> Tensor:
        """The map (out, in), a view of what is stored."""
        stored = getattr(self.module, self.weight)
        return (stored.T if self.is_transposed else stored)[self.start : self.stop]


@dataclass(frozen=True)
class NormPlace:
    """A norm by where it hangs, so that it can be replaced."""

    name: str
    """Its name in the model."""
    parent: nn.Module
    """The module that it hangs in."""
    attribute: str
    """Its name there."""

    @property
    def module(self) -> nn.Module:
        """The norm that hangs there now."""
        return getattr(self.parent, self.attribute)


@dataclass(frozen=True)
class Tap:
    """Where the residual stream, to which a branch will be added, passes by."""

    module: nn.Module
    """A module that the stream enters or leaves."""
    leaves: bool = False
    """Whether the stream is what the module returns, rather than what it is called with."""
    position: int = 0
    """Which positional argument it enters as."""
    keyword: str = ""
    """The name of that argument."""


@dataclass(frozen=True)
class Attention:
    """What an attention projects its queries, keys and values with, and how they split into heads."""

    name: str
    """Name of `module` in the model."""
    module: nn.Module
    """The module whose call projects, splits and mixes."""
    query: Matrix
    key: Matrix
    """In cross-attention it reads the memory, as `value` does."""
    value: Matrix
    head_dim: int
    """Width of a head of queries and keys; head h is their outputs from h * head_dim on."""
    scale: float
    """Factor on the dot products."""

    @property
    def num_heads(self) -> int:
        """Heads of the queries."""
        return self.query.view().shape[0] // self.head_dim

    @property
    def num_kv_heads(self) -> int:
        """Heads of the keys, each serving `num_heads / num_kv_heads` neighbouring heads of the queries."""
        return self.key.view().shape[0] // self.head_dim

    @property
    def has_norms(self) -> bool:
        """Whether queries or keys are normalized between their projection and their product."""
        return any(getattr(self.module, name, None) is not None for name in QK_NORMS)


@dataclass(frozen=True)
class Branch:
    """One residual branch: what reads the stream, what is added to it, and the norms around."""

    name: str
    """A name for messages: that of the module that computes it."""
    block: str
    """Name of the layer that it belongs to."""
    stack: str
    """Name of the list of layers that it belongs to."""
    kind: Kind
    placement: Placement
    output: Matrix
    """The linear map whose result is added, after dropout, to the stream; peri-norm: the norm, whose weight is (dim,)."""
    result: nn.Module
    """The module whose call returns the branch, before dropout, alone or first in a tuple."""
    inputs: tuple[Matrix, ...]
    """All linear maps that read the stream (pre-norm: the normalized stream)."""
    attention: Attention | None = None
    """What an attention is made of; None in a feed-forward branch."""
    norm: NormPlace | None = None
    """The norm before the branch (pre, peri) or after the sum (post)."""
    taps: tuple[Tap, ...] = ()
    """Post-norm only: where the stream passes before the sum; the last one that it passed counts."""
    batch_first: bool = True
    """Whether the stream is (batch, seq, dim) rather than (seq, batch, dim)."""
    uses: int = 1
    """How often the model holds this layer: more than once where layers share all their weights."""

    @property
    def value(self) -> Matrix | None:
        """The values' map of an attention."""
        return None if self.attention is None else self.attention.value

    @property
    def dim(self) -> int:
        """Width of the stream."""
        return self.output.view().shape[0]
