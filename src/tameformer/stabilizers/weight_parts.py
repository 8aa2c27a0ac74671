"""A stored weight as the matrices that act in it: transposed layouts, flattened kernels, fused projections.

Fused projections are taken apart because sigma of query, key and value together is at least that of each, and one factor
for all three would couple them.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from tameformer.errors import PatchError


@dataclass(frozen=True)
class Rows:
    """How the rows of a matrix (one an output) divide into parts: `sizes` one after the other, the whole `groups` times.

    `Rows((8, 8, 8))` is query, key and value one below the other; `Rows((8, 4, 4), groups=2)` is two heads' queries, one key
    and one value, and that again for the next two heads.
    """

    sizes: tuple[int, ...]
    groups: int = 1

    @property
    def count(self) -> int:
        """Rows in all."""
        return self.groups * sum(self.sizes)


Split = Callable[[str, nn.Module, nn.Module | None], Rows | None]
"""From a layer's name, the layer and the module that holds it to its parts; None is one part."""


def whole(name: str, module: nn.Module, parent: nn.Module | None) -> None:
    """Every weight as one matrix."""


def split_fused(name: str, module: nn.Module, parent: nn.Module | None) -> Rows | None:
    """Parts of the joint projections of query, key and value, by the names and layouts in common use.

    `qkv`, `qkv_proj`, `Wqkv`, `c_attn` and the like hold query, key and value one below the other; with fewer key-value heads,
    which are read from the parent or its config, in unequal parts. `query_key_value` and `wqkv` hold them by group of heads.
    `kv` and the like are two parts, and `in_proj_weight` of `MultiheadAttention` three.

    Example:
        >>> split_fused("blocks.0.attn.qkv", nn.Linear(8, 24), None)
        Rows(sizes=(8, 8, 8), groups=1)
    """
    if isinstance(module, nn.MultiheadAttention):
        return Rows((module.embed_dim,) * 3) if module._qkv_same_embed_dim else None
    leaf = name.rsplit(".", 1)[-1]
    count = out_features(module)
    if re.fullmatch(r"(to_|w|c_)?kv(_proj)?", leaf, re.IGNORECASE) and count % 2 == 0:
        return Rows((count // 2,) * 2)
    if not re.fullmatch(r"(to_|w|c_|in_)?qkv(_proj|s)?|query_key_value|c_attn|W_pack", leaf, re.IGNORECASE):
        return None
    if leaf == "c_attn" and getattr(parent, "is_cross_attention", False):
        return Rows((count // 2,) * 2)
    heads = _number(parent, "num_heads", "num_attention_heads", "n_head", "n_heads")
    kv_heads = _number(parent, "num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_heads_kv") or heads
    if getattr(parent, "multi_query", False) and not getattr(parent, "new_decoder_architecture", False):
        kv_heads = 1
    if not heads or not kv_heads or heads % kv_heads or count % (heads + 2 * kv_heads):
        return Rows((count // 3,) * 3) if count % 3 == 0 else None
    head_dim = count // (heads + 2 * kv_heads)
    if leaf in ("query_key_value", "wqkv") and kv_heads > 1:
        return Rows((heads // kv_heads * head_dim, head_dim, head_dim), groups=kv_heads)
    return Rows((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim))


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """The weights of a layer that act as matrices; none for a layer of another kind."""
    if isinstance(module, nn.MultiheadAttention):
        joint = ("in_proj_weight",)
        return joint if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    is_matrix = isinstance(module, (nn.Linear, _ConvNd)) or is_transposed(module)
    return ("weight",) if is_matrix and not isinstance(module, _ConvTransposeNd) else ()


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out), as GPT-2's `Conv1D` does."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.removeprefix("Parametrized") == "Conv1D"
        and isinstance(weight, Tensor)
        and weight.dim() == 2
    )


def out_features(module: nn.Module) -> int:
    """Rows of the layer's matrix."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.shape[1] if is_transposed(module) else weight.shape[0]


class Parts:
    """The way from a stored weight to its matrices and back.

    Args:
        shape: Of the stored weight.
        transposed: Whether it is stored as (in, out).
        rows: The parts; None is one.
    """

    def __init__(self, shape: torch.Size, *, transposed: bool = False, rows: Rows | None = None) -> None:
        count = shape[1] if transposed else shape[0]
        rows = Rows((count,)) if rows is None else rows
        if rows.count != count or min(rows.sizes) < 1:
            raise PatchError(f"expected parts that make up {count} rows, got {rows}; mend split=")
        self.shape, self.transposed, self.groups = shape, transposed, rows.groups
        self.sizes = tuple(rows.groups * size for size in rows.sizes)
        self.columns = shape.numel() // count
        self._in_group = rows.sizes
        self._is_stored_so = len(self.sizes) == 1 and len(shape) == 2 and not transposed

    def of(self, weight: Tensor) -> list[Tensor]:
        """The matrices: views, but copies where the parts lie in groups."""
        if self._is_stored_so:
            return [weight]
        matrix = weight.t() if self.transposed else weight.flatten(1)
        if len(self.sizes) == 1:
            return [matrix]
        if self.groups == 1:
            return list(matrix.split(self.sizes))
        blocks = matrix.unflatten(0, (self.groups, -1)).split(self._in_group, dim=1)
        return [block.flatten(0, 1) for block in blocks]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The stored weight made of the matrices."""
        if self.groups == 1:
            matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            matrix = torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], dim=1).flatten(0, 1)
        return matrix.t() if self.transposed else matrix.view(self.shape)

    def filled(self, weight: Tensor, fill: Sequence[Callable]) -> Tensor:
        """A new tensor like `weight` whose matrices are what `fill` gives or writes, one `write(out=matrix)` a part."""
        if self._is_stored_so and weight.dtype in (torch.float32, torch.float64):
            return fill[0]()
        result = torch.empty_like(weight, memory_format=torch.contiguous_format)
        if self.groups == 1:
            for write, part in zip(fill, self.of(result), strict=True):
                write(out=part)
            return result
        parts = [weight.new_empty(size, self.columns) for size in self.sizes]
        for write, part in zip(fill, parts, strict=True):
            write(out=part)
        return self.join(parts)


def _number(parent: nn.Module | None, *names: str) -> int | None:
    """The first of these attributes that is a positive number, on the module or on its config."""
    for holder in (parent, getattr(parent, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None
