"""Query and key weights scaled down after a step in which their heads' largest logit went beyond a threshold.

Kimi Team 2025, "Kimi K2: Open Agentic Intelligence", arXiv:2507.20534, section 2.1 and algorithm 1 (MuonClip), with any
optimizer: with S the largest scaled logit that a head had since the last step and gamma = min(1, threshold / S), the rows of
W_q and its bias are multiplied by gamma^alpha, those of W_k by gamma^(1 - alpha).

What the paper leaves open is done so: S is over the pairs that the mask allows, over all micro-batches and all processes;
query heads that share a key share the largest S; a head whose S is negative is left alone, and so is one whose S is NaN or
infinite, which is counted. Not for attention with latent keys, nor beside `qk_norm`, which undoes any scale of the weights.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn

from tameformer.errors import PatchError
from tameformer.nn.attention.largest_logits import largest_logits
from tameformer.optim.followed import Followed
from tameformer.patch.adapters import Attention, Matrix
from tameformer.patch.attend import OpenAttention, check_calls_torch, open_attention
from tameformer.patch.handle import PatchHandle
from tameformer.patch.parametrized import chain_of
from tameformer.patch.select import Selector
from tameformer.shapes import Float, Int
from tameformer.stabilizers.attention_parts import chosen_attentions
from tameformer.stabilizers.branch_norms import without_nested_tensors
from tameformer.stabilizers.branch_scale import weight_owners


def qk_clip(
    model: nn.Module, *, threshold: float = 100.0, alpha: float = 0.5, where: Selector | None = None
) -> PatchHandle:
    """After each step of an optimizer, scale the query and key weights of heads whose logits went beyond `threshold`.

    The outputs are those of the model; an extra product of queries and keys a training pass finds the logits. Steps of any
    `torch.optim.Optimizer` that has the weights are seen. Where several processes train, all must hold the same layers.
    Removing and baking are the same: clipping ends, and the weights stay as they are.

    Args:
        model: Any model with layers that we know.
        threshold: What the largest logit is brought back to, above 0.
        alpha: The queries' share of the factor, from 0 to 1.
        where: Takes attentions by name and module; None takes all.

    Raises:
        PatchError: The model has no such attention, computes its softmax itself, normalizes queries or keys, has tied or
            parametrized projections, or is clipped already.
        ValueError: `threshold` or `alpha` is out of range.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> handle = qk_clip(model, threshold=50.0)
        >>> handle
        PatchHandle(qk_clip, 2 places, 0 new parameters)
        >>> handle.remove()
    """
    if not 0 < threshold < math.inf or not 0 <= alpha <= 1:
        raise ValueError(f"expected threshold above 0 and alpha from 0 to 1, got {threshold} and {alpha}")
    found = chosen_attentions(model, where)
    owners = weight_owners(model)
    for attention in found:
        _check(attention, owners)
    with ExitStack() as undo:
        without_nested_tensors(undo, model)
        for attention in found:
            opened = open_attention(undo, attention.module, attention.name)
            if _clip_of(opened) is not None:
                raise PatchError(f"qk_clip is on {attention.name} already; remove it first")
            clip = _Clip(attention, threshold, alpha)
            opened.watchers.append(clip)
            undo.callback(opened.watchers.remove, clip)
            LIVE.add(clip)
            undo.callback(LIVE.discard, clip)
        kept = undo.pop_all()
    names, settings = [attention.name for attention in found], {"threshold": threshold, "alpha": alpha}
    return PatchHandle("qk_clip", names, kept, bake=kept.close, settings=settings)


@dataclass(frozen=True)
class ClippedHeads:
    """What clipping did to the heads of one attention; query heads that share a key count as one."""

    largest_logit: Float[Tensor, " kv_heads"]
    """The largest scaled logit before the last step, over all processes; -inf before the first, NaN if it was not finite."""
    times_clipped: Int[Tensor, " kv_heads"]
    """After how many steps the weights were scaled down."""
    times_not_finite: Int[Tensor, " kv_heads"]
    """After how many steps they were left alone because a logit was NaN or infinite."""


def qk_clip_state(model: nn.Module) -> dict[str, ClippedHeads]:
    """What `qk_clip` did so far, by the name of the attention; empty where it is not on the model.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> with qk_clip(model):
        ...     _ = model(torch.zeros(1, 3, 8))
        ...     torch.optim.SGD(model.parameters()).step()
        ...     qk_clip_state(model)["layers.0.self_attn"].times_clipped
        tensor([0, 0])
    """
    clips = (_clip_of(vars(module).get("forward")) for module in model.modules())
    return {
        clip.attention.name: ClippedHeads(clip.last.clone(), clip.clipped.clone(), clip.not_finite.clone())
        for clip in clips
        if clip is not None
    }


def _clip_of(forward: Any) -> "_Clip | None":
    watchers = forward.watchers if isinstance(forward, OpenAttention) else ()
    return next((watcher for watcher in watchers if isinstance(watcher, _Clip)), None)


def _check(attention: Attention, owners: dict[int, int]) -> None:
    check_calls_torch(attention.module, attention.name, "qk_clip")
    if attention.has_norms:
        raise PatchError(
            f"{attention.name} normalizes its queries or keys, which undoes what qk_clip would do; leave one of the two out"
        )
    for matrix in (attention.query, attention.key):
        for name in filter(None, (matrix.weight, matrix.bias)):
            if chain_of(matrix.module, name) is not None:
                raise PatchError(
                    f"qk_clip scales stored weights, but {matrix.name}.{name} is computed by another patch; bake that first"
                )
            if owners[id(getattr(matrix.module, name))] > 1:
                raise PatchError(f"qk_clip would scale {matrix.name}.{name} also where else it serves; untie it")


class _Clip:
    """The largest logits of one attention since the last step, and what follows from them."""

    def __init__(self, attention: Attention, threshold: float, alpha: float) -> None:
        self.attention, self.threshold, self.alpha = attention, threshold, alpha
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self._start(attention.query.view().device)

    def _start(self, device: torch.device) -> None:
        # Plain tensors, not buffers: DistributedDataParallel would overwrite those with the first process's before a pass.
        self.largest = torch.full((self.num_kv_heads,), -torch.inf, device=device)
        self.last = self.largest.clone()
        self.clipped, self.not_finite = (torch.zeros_like(self.largest, dtype=torch.int64) for _ in range(2))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        LIVE.add(self)  # a copy of the model clips its own weights

    def followed(self) -> Tensor:
        """The queries' stored weight."""
        return getattr(self.attention.query.module, self.attention.query.weight)

    def __call__(
        self, query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float | None
    ) -> None:
        if not self.attention.module.training:
            return
        if self.largest.device != query.device:  # the model was moved
            self._start(query.device)
        with torch.no_grad():
            found = largest_logits(query, key, mask=mask, is_causal=is_causal, scale=scale)
            found = found.to(self.largest.dtype).view(self.num_kv_heads, -1).amax(-1)
            self.largest.copy_(torch.maximum(self.largest, found))  # NaN stays

    def apply(self, largest: Tensor, is_bad: Tensor) -> None:
        """Scale by the largest logits of all processes, -inf where they are not finite, and start over."""
        gamma = torch.where(largest > self.threshold, self.threshold / largest, 1.0)
        served = self.num_heads // self.num_kv_heads
        _scale_rows(self.attention.query, gamma.pow(self.alpha).repeat_interleave(served * self.attention.head_dim))
        _scale_rows(self.attention.key, gamma.pow(1 - self.alpha).repeat_interleave(self.attention.head_dim))
        self.last = torch.where(is_bad, torch.nan, largest)
        self.clipped += gamma < 1
        self.not_finite += is_bad
        self.largest.fill_(-torch.inf)


@torch.no_grad()
def clip_due(due: Sequence[_Clip]) -> None:
    """Clip these attentions by the largest logits of all processes, told to each other once."""
    device = due[0].largest.device
    largest = torch.cat([clip.largest.to(device) for clip in due])
    is_bad = ~(largest < torch.inf)  # NaN and infinity; -inf is a layer that did not run
    # What the largest of a number and NaN is, processes do not agree on.
    told = torch.cat([largest.masked_fill(is_bad, -torch.inf), is_bad.to(largest.dtype)])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
    largest, is_bad = told.chunk(2)
    sizes = [clip.num_kv_heads for clip in due]
    for clip, of_clip, bad in zip(due, largest.split(sizes), is_bad.bool().split(sizes), strict=True):
        clip.apply(of_clip.to(clip.largest.device), bad.to(clip.largest.device))


def _scale_rows(matrix: Matrix, factors: Tensor) -> None:
    """Multiply the map's outputs, in the weight and the bias that are stored; other rows by 1."""
    for name in filter(None, (matrix.weight, matrix.bias)):
        stored = getattr(matrix.module, name)
        axis = 1 if matrix.is_transposed and name == matrix.weight else 0
        rows = stored.shape[axis]
        start, stop = matrix.start or 0, rows if matrix.stop is None else matrix.stop
        if stored.dim() != (2 if name == matrix.weight else 1) or stop - start != len(factors):
            raise PatchError(
                f"{matrix.name}.{name} has become {tuple(stored.shape)} where qk_clip knew {len(factors)} outputs; shard with "
                f"fully_shard, and change no heads while it is on"
            )
        every = torch.ones(rows, dtype=stored.dtype, device=factors.device)
        every[start:stop] = factors.to(stored.dtype)
        every = every.view([-1 if place == axis else 1 for place in range(stored.dim())])
        stored.mul_(_sharded_as(stored, every))


def _sharded_as(stored: Any, factors: Tensor) -> Any:
    """The part of the factors that stands beside this process's part of a weight; every process has them all."""
    if not hasattr(stored, "placements"):
        return factors
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [
        Replicate() if place.is_shard() and factors.shape[place.dim] == 1 else place for place in stored.placements
    ]
    return distribute_tensor(factors, stored.device_mesh, placements, src_data_rank=None)


LIVE = Followed(clip_due)
