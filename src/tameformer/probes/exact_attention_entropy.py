"""Attention entropy of every query of every sequence, exactly, for one more attention forward a layer; on a CPU two thirds.

For those who want no estimate: `AttentionEntropy` costs a tenth of it. Not in the default set.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tameformer.nn.attention.entropy import attention_entropy, centred_keys, logits_entropy
from tameformer.nn.attention.logsumexp import entropy_from_logsumexp
from tameformer.patch import AttentionCall
from tameformer.probes.edge_entropy import edge_entropy
from tameformer.probes.probe import Probe


class ExactAttentionEntropy(Probe):
    """`diag/attention_entropy/<layer>`: mean over all queries, a value a head, in nats; and `..._min`, the sharpest query.

    Give the `Watch` or `Monitor` `sequences=None`, or only the first sequence is seen. Queries without a visible key do
    not count; padding queries that do see keys count. The first call of a layer within the forward pass counts.
    """

    def __init__(self) -> None:
        self._values: dict[str, Tensor] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self._values.clear()

    def on_attention(self, call: AttentionCall) -> None:
        """Measure the call."""
        if f"diag/attention_entropy/{call.layer}" in self._values:
            return
        entropy = all_entropies(call)
        seen = ~_unseeing(entropy, call)
        count = seen.sum((0, 2))
        self._values[f"diag/attention_entropy/{call.layer}"] = torch.where(seen, entropy, 0.0).sum((0, 2)) / count
        self._values[f"diag/attention_entropy_min/{call.layer}"] = torch.where(seen, entropy, math.inf).amin((0, 2))

    def read(self) -> Mapping[str, Tensor]:
        """The values of the last observed step."""
        return dict(self._values)


def all_entropies(call: AttentionCall) -> Tensor:
    """Entropy in nats of every query of a call, (batch, heads, query); NaN where nothing is visible."""
    if call.logits is not None and call.groups is not None:
        return edge_entropy(call.logits, call.groups, call.num_queries).T[None]
    if call.logits is not None:
        lowest = torch.finfo(call.logits.dtype).min / 2
        return logits_entropy(call.logits.float(), call.logits > lowest)
    assert call.query is not None
    assert call.key is not None
    if call.query.device.type != "cuda" or call.mask is not None:
        return attention_entropy(call.query, call.key, call.mask, call.is_causal, call.scale)
    # The choice between its two ways would wait for the device.
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    keys = centred_keys(call.key.float())
    return entropy_from_logsumexp(call.query.float(), keys, is_causal=call.is_causal, scale=scale)


def _unseeing(entropy: Tensor, call: AttentionCall) -> Tensor:
    """Where NaN means that nothing was visible; every other NaN stays one."""
    if call.mask is None and call.logits is None:
        return torch.zeros_like(entropy, dtype=torch.bool)
    if call.groups is not None:
        has_edges = torch.zeros(call.num_queries, device=entropy.device).index_fill(0, call.groups, 1) > 0
        hidden = ~has_edges
    elif call.logits is not None:
        hidden = (call.logits <= torch.finfo(call.logits.dtype).min / 2).all(-1)
    else:
        assert call.mask is not None
        mask = call.mask if call.mask.dtype == torch.bool else call.mask > torch.finfo(call.mask.dtype).min / 2
        hidden = ~mask.any(-1)
    return hidden.expand(entropy.shape)
