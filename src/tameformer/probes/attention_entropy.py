"""Attention entropy of every head of a model built from our layers, from a few query rows of one sequence.

The rows are exact; the mean over them estimates the mean over all. At 32 rows the error of a head's mean is about 1.5 % of
its size (measured on a 4-layer character model).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tameformer.nn.attention.dot_product import DotProductAttention
from tameformer.nn.attention.entropy import logits_entropy, stratified_rows

NAME = "diag/attention_entropy"
CEILING = "diag/attention_entropy_max"


class AttentionEntropy:
    """Watches the attention calls of a model during a step.

    Args:
        model: Its `DotProductAttention` modules are watched; the first call of each within the step counts.
        rows: Query rows per head.
    """

    def __init__(self, model: nn.Module, *, rows: int = 32) -> None:
        self.rows = rows
        self._calls = {
            name.rpartition(".")[0] or name: module
            for name, module in model.named_modules()
            if isinstance(module, DotProductAttention)
        }
        self._values: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the step that runs inside; nothing is left on the model afterwards."""
        self._values.clear()
        with ExitStack() as hooks:
            for name, module in self._calls.items():
                hook = module.register_forward_pre_hook(partial(self._measure, name), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def read(self) -> Mapping[str, Tensor]:
        """Entropy in nats by `diag/attention_entropy/<layer>`, one value a head, and the ceiling of each layer."""
        return dict(self._values)

    def summary(self, values: Mapping[str, float]) -> Mapping[str, float]:
        """The mean over all heads; NaN when one of them is NaN."""
        heads = [value for key, value in values.items() if key.startswith(f"{NAME}/")]
        return {"train/attention_entropy": math.fsum(heads) / len(heads)} if heads else {}

    @torch.no_grad()
    def _measure(self, name: str, module: DotProductAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if f"{NAME}/{name}" in self._values:
            return
        query, key = args[0], args[1]
        with torch.autocast(query.device.type, enabled=False):
            entropy, ceiling = sampled_entropy(
                query[:1],
                key[:1],
                mask=kwargs.get("mask"),
                is_causal=kwargs.get("is_causal", False),
                scale=module.scale,
                rows=self.rows,
            )
        self._values[f"{NAME}/{name}"] = entropy
        self._values[f"{CEILING}/{name}"] = ceiling


def sampled_entropy(
    query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float | None, rows: int
) -> tuple[Tensor, Tensor]:
    """Mean entropy of each head over evenly spread query rows of the first sequence, and the mean log of visible keys.

    Args:
        query: (batch, heads, query, head_dim).
        key: (batch, kv_heads, key, head_dim); fewer heads are shared by neighbouring query heads.
        mask: Boolean, True = may attend, (batch, heads, query, key), where any axis may be 1.
        is_causal: Each query sees the keys up to its own position.
        scale: Factor on the dot product; None is 1/sqrt(head_dim).
        rows: How many rows at most.

    Returns:
        Entropy in nats, (heads,), and the ceiling, (1,); rows without a visible key do not count.
    """
    length, keys = query.shape[-2], key.shape[-2]
    chosen = stratified_rows(length, rows).to(query.device)
    factor = scale if scale is not None else query.shape[-1] ** -0.5
    logits = (query[0, :, chosen].float() * factor) @ _expanded(key[0], query.shape[1]).float().mT
    if mask is None and not is_causal:
        return logits_entropy(logits).mean(-1), query.new_full((1,), math.log(keys), dtype=torch.float32)
    visible = torch.ones(1, len(chosen), keys, dtype=torch.bool, device=query.device)
    if is_causal:
        visible = torch.arange(keys, device=query.device) <= chosen[None, :, None]
    if mask is not None:
        first = mask[0]
        visible = visible & (first[:, chosen] if first.shape[-2] == length else first)
    counts = visible.sum(-1)
    seen = counts > 0
    entropy = torch.where(seen, logits_entropy(logits, visible), 0.0).sum(-1) / seen.expand(logits.shape[:-1]).sum(-1)
    ceiling = counts.clamp(min=1).log().sum() / seen.sum()
    return entropy, ceiling.reshape(1)


def _expanded(key: Tensor, heads: int) -> Tensor:
    """Each of the shared key heads once for every query head that uses it."""
    return key if key.shape[0] == heads else key.repeat_interleave(heads // key.shape[0], dim=0)
