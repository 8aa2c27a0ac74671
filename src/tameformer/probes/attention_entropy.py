"""How widely each head spreads its attention, from a few query rows of a step (Zhai et al. 2023, arXiv:2303.06296, section 3).

Each row is exact: its logits are computed from queries and keys, in float32, whatever kernel the model uses. Only the mean
over rows is an estimate, and its standard error is measured with it. 32 rows of one sequence are computed in less than 1 % of
a step from 128 tokens up: `benchmarks/results/entropy_cost.md`.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from tameformer.nn.attention.entropy import stratified_rows
from tameformer.nn.attention.entropy_bounds import centred_logit_norm, entropy_lower_bound
from tameformer.patch import AttentionCall
from tameformer.probes.edge_entropy import edge_statistics
from tameformer.probes.probe import Probe
from tameformer.shapes import Bool, Float, Int

_HIDDEN = -1e30  # finite, so that no difference of infinities comes up
_BOUND_ROWS = 8
_STEPS = 256
"""Calls of one query each that are kept of a layer."""
Rows = tuple[Tensor, Tensor | None, Tensor | None]
"""Logits, which keys are visible, which rows are real queries: see `row_logits`."""


class AttentionEntropy(Probe):
    """Entropy, largest logit and entropy bound of every head, estimated from evenly spread query rows.

    `read` gives, a value a head, in nats unless said otherwise:

    - `diag/attention_entropy/<layer>`: mean over the rows,
    - `diag/attention_entropy_error/<layer>`: standard error of that mean, as an estimate of the mean over all queries,
    - `diag/attention_entropy_min/<layer>`: the sharpest row,
    - `diag/attention_entropy_bound/<layer>`: the lower bound that the spread of the logits leaves, mean over eight of the rows,
    - `diag/attention_logit_max/<layer>`: the largest logit in the rows, no unit,
    - `diag/attention_entropy_max/<layer>`: one value a layer, the mean logarithm of the number of visible keys.

    Queries that may attend to nothing, or not to their own position where queries and keys are equally many, are padding and
    do not count. Where a layer calls attention several times in a forward pass, the first call counts, but calls of one query
    each (a recurrent decoder's) are the rows of one. Attention along the edges of a graph is measured at all queries, exactly.

    Args:
        rows: Query rows of each sequence and head.
    """

    def __init__(self, *, rows: int = 32) -> None:
        self.rows = rows
        self._seen: dict[str, list[Rows]] = {}
        self._along_edges: dict[str, dict[str, Tensor]] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._seen.clear()
        self._along_edges.clear()

    def on_attention(self, call: AttentionCall) -> None:
        """Keep the logits of a few rows; they are evaluated together, because small operations cost their call."""
        if call.logits is not None and call.groups is not None:
            if call.layer not in self._along_edges:
                self._along_edges[call.layer] = edge_statistics(call.logits, call.groups, call.num_queries)
            return
        seen = self._seen.setdefault(call.layer, [])
        if not seen:
            seen.append(row_logits(call, self.rows))
        elif seen[0][0].shape[2] == 1 == _num_queries(call) and len(seen) < _STEPS:
            rows = row_logits(call, self.rows)
            if _shapes(rows) == _shapes(seen[0]):
                seen.append(rows)

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step, on the device."""
        seen = {layer: _joined(calls) for layer, calls in self._seen.items()}
        found: dict[str, dict[str, Tensor]] = {layer: {} for layer in seen}
        for layers in _alike(seen):
            logits, visible, counted = zip(*(seen[layer] for layer in layers), strict=True)
            for name, values in row_statistics(torch.stack(logits), _stack(visible), _stack(counted)).items():
                for layer, value in zip(layers, values.unbind(), strict=True):
                    found[layer][f"diag/{name}/{layer}"] = value
        for layer, statistics in self._along_edges.items():
            found.setdefault(layer, {}).update({f"diag/{name}/{layer}": value for name, value in statistics.items()})
        return {key: value for values in found.values() for key, value in values.items()}

    def summary(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """`train/attention_entropy`, the mean over all heads; NaN when one of them is NaN."""
        heads = [value for key, value in values.items() if key.startswith("diag/attention_entropy/")]
        return {"train/attention_entropy": math.fsum(heads) / len(heads)} if heads else {}


def row_logits(call: AttentionCall, rows: int) -> Rows:
    """The logits of evenly spread query rows, each sequence with its own rows.

    Returns:
        Logits, float32, (batch, heads, rows, key); which keys are visible, broadcasting to that, None for all; which rows
        are real queries, (batch, 1 or heads, rows), None for all.
    """
    source = _source(call)
    batch, length = source.shape[0], source.shape[2]
    chosen = _spread(batch, length, rows, source.device)
    if call.logits is not None:
        logits = _take(call.logits, chosen).float()
        visible = logits > torch.finfo(call.logits.dtype).min / 2
        return logits, visible, _real(visible, chosen, length)
    assert call.query is not None
    assert call.key is not None
    keys = call.key.shape[2]
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    logits = _scores(_take(call.query, chosen).float() * scale, call.key.float())
    visible = _past(batch, length, rows, keys, source.device) if call.is_causal else None
    if call.mask is None:
        return logits, visible, None
    mask = _take(call.mask.expand(batch, -1, -1, -1), chosen) if call.mask.shape[2] > 1 else call.mask
    allowed = mask
    if mask.dtype != torch.bool:
        logits = logits + mask.float()
        allowed = mask > torch.finfo(mask.dtype).min / 2
    visible = (allowed if visible is None else visible & allowed).expand(batch, -1, chosen.shape[-1], keys)
    return logits, visible, _real(visible, chosen, length)


def row_statistics(
    logits: Float[Tensor, "layers batch heads rows key"],
    visible: Bool[Tensor, "layers #batch #heads rows key"] | None = None,
    counted: Bool[Tensor, "layers #batch #heads rows"] | None = None,
) -> dict[str, Tensor]:
    """What `AttentionEntropy` measures, by its name, from rows of logits; (layers, heads) each, the ceiling (layers,).

    Example:
        >>> row_statistics(torch.zeros(1, 1, 1, 8, 4))["attention_entropy"]
        tensor([[1.3863]])
    """
    shape, keys = logits.shape[:-1], logits.shape[-1]
    if visible is None:
        scores = logits
        sizes = torch.full(shape, keys, device=logits.device)
        kept = torch.ones(shape, dtype=torch.bool, device=logits.device)
    else:
        scores = logits.masked_fill(~visible, _HIDDEN)
        sizes = visible.sum(-1).expand(shape)
        kept = (sizes > 0) if counted is None else (sizes > 0) & counted
    # Few passes over the logits. With the row's maximum taken off, log Z - sum p s has no negative terms; 1 / Z is the
    # largest weight.
    largest = scores.amax(-1)
    shifted = scores - largest[..., None] if scores is logits else scores.sub_(largest[..., None])
    weights = shifted.softmax(-1)
    entropy = 0.0 - (weights.amax(-1).log_() + weights.mul_(shifted).sum(-1))
    count = kept.sum((1, 3))
    # The bound takes more passes than all the rest: a few rows do.
    few = slice(None, None, max(1, shape[-1] // _BOUND_ROWS))
    some_visible = None if visible is None else visible[..., few, :]
    some = entropy_lower_bound(centred_logit_norm(logits[..., few, :], some_visible), sizes[..., few].clamp(min=1))
    bound = torch.where(kept[..., few], some, 0.0).sum((1, 3)) / kept[..., few].sum((1, 3))

    def mean(values: Tensor) -> Tensor:
        return torch.where(kept, values, 0.0).sum((1, 3)) / count

    both = kept[..., 1:] & kept[..., :-1]
    jumps = torch.where(both, entropy.diff(dim=-1), 0.0).square().sum((1, 3)) / (2 * both.sum((1, 3)).clamp(min=1))
    nan = torch.where(count > 0, 0.0, torch.nan)
    return {
        "attention_entropy": mean(entropy),
        # Neighbouring rows differ by noise more than by position: the variance of systematic samples.
        "attention_entropy_error": (jumps / count).sqrt(),
        "attention_entropy_min": _smallest(entropy, kept) + nan,
        "attention_entropy_bound": bound,
        "attention_logit_max": -_smallest(-largest, kept) + nan,
        "attention_entropy_max": (torch.where(kept, sizes.clamp(min=1).log(), 0.0).sum((1, 2, 3)) / count.sum(-1)),
    }


def _smallest(values: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, values, torch.inf).amin((1, 3))


def _source(call: AttentionCall) -> Tensor:
    """What says where the queries are, (batch, heads, query, ...)."""
    source = call.query if call.query is not None else call.logits
    assert source is not None
    return source


def _num_queries(call: AttentionCall) -> int:
    return _source(call).shape[2]


def _joined(calls: Sequence[Rows]) -> Rows:
    """The rows of several calls as those of one."""
    if len(calls) == 1:
        return calls[0]
    logits, visible, counted = (
        None if parts[0] is None else torch.cat([part for part in parts if part is not None], dim=2)
        for parts in zip(*calls, strict=True)
    )
    assert logits is not None
    return logits, visible, counted


def _shapes(rows: Rows) -> tuple[object, ...]:
    return tuple(None if tensor is None else (tensor.shape, tensor.device) for tensor in rows)


def _alike(seen: Mapping[str, Rows]) -> list[list[str]]:
    """The layers in groups whose tensors can be stacked."""
    groups: dict[object, list[str]] = {}
    for layer, rows in seen.items():
        groups.setdefault(_shapes(rows), []).append(layer)
    return list(groups.values())


def _stack(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


@lru_cache(maxsize=8)  # the same in every layer and step
def _spread(batch: int, length: int, rows: int, device: torch.device) -> Int[Tensor, "batch rows"]:
    """Evenly spread positions; with several sequences each starts a little further on."""
    if batch == 1:
        return stratified_rows(length, rows, device)[None]
    count = min(length, rows)
    shift = (torch.arange(batch, device=device)[:, None] + 0.5) / batch
    return ((torch.arange(count, device=device) + shift) * (length / count)).long()


@lru_cache(maxsize=8)
def _past(batch: int, length: int, rows: int, keys: int, device: torch.device) -> Bool[Tensor, "batch 1 rows key"]:
    """Keys up to the position of each row."""
    return (torch.arange(keys, device=device) <= _spread(batch, length, rows, device)[..., None])[:, None]


def _take(tensor: Tensor, chosen: Int[Tensor, "batch rows"]) -> Tensor:
    """The chosen positions of the third axis, each sequence its own."""
    if chosen.shape[0] == 1:
        return tensor.index_select(2, chosen[0])
    index = chosen[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Dot products; neighbouring query heads share a key head without a copy of it."""
    batch, heads, rows, dim = query.shape
    shared = query.reshape(batch * key.shape[1], heads // key.shape[1] * rows, dim)
    return torch.bmm(shared, key.flatten(0, 1).mT).view(batch, heads, rows, -1)


def _real(visible: Tensor, chosen: Tensor, length: int) -> Tensor | None:
    """Where a query sees its own position: padding does not."""
    if visible.shape[-1] != length:
        return None
    own = chosen[:, None, :, None].expand(visible.shape[0], visible.shape[1], -1, 1)
    return visible.gather(-1, own).squeeze(-1)
