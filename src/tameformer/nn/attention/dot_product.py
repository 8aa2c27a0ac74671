"""Scaled dot-product attention as a module of its own (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

Every attention layer calls it through this one module, so that a forward pre-hook sees queries, keys, values and mask
of any layer without knowing the layer, and another score function is another class with the same `forward`.
"""

import torch
from torch import Tensor, nn

from tameformer.nn.attention.attend import attention_weights, check_one_mask, fused_attention
from tameformer.nn.attention.scores.dot import DotScore
from tameformer.shapes import Float, Mask


class DotProductAttention(nn.Module):
    """softmax(query keyᵀ · scale) values, by torch's fused kernels.

    Attributes:
        scale: factor on the logits; None is 1 / sqrt(head_dim).
        dropout: probability of dropping a weight while training.
        compute_dtype: under autocast the type to compute in instead of autocast's own; None leaves it to autocast.
            On some processors the bf16 backward is slower than the fp32 one by more than the casts cost.
    """

    def __init__(self, *, scale: float | None = None, dropout: float = 0.0):
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.compute_dtype: torch.dtype | None = None

    def forward(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        value: Float[Tensor, "batch kv_heads key value_dim"],
        *,
        mask: Mask | None = None,
        bias: Float[Tensor, "#batch #heads #query #key"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The values mixed for each query; zeros for a query that may attend to nothing.

        `is_causal` lets query i attend to keys 0..i and needs no mask in memory; it excludes `mask`.
        `bias` is added to the scaled products. Each of `kv_heads` keys and values serves `heads / kv_heads` neighbouring
        query heads.

        Raises:
            ValueError: both `mask` and `is_causal` are given.
        """
        check_one_mask(mask, is_causal)
        device_type = query.device.type
        if self.compute_dtype is None or not torch.is_autocast_enabled(device_type):
            return self._attend(query, key, value, mask, bias, is_causal)
        query, key = query.to(self.compute_dtype), key.to(self.compute_dtype)
        with torch.autocast(device_type, enabled=False):
            return self._attend(query, key, value.to(self.compute_dtype), mask, bias, is_causal).to(value.dtype)

    def weights(
        self,
        query: Float[Tensor, "batch heads query head_dim"],
        key: Float[Tensor, "batch kv_heads key head_dim"],
        *,
        mask: Mask | None = None,
        bias: Float[Tensor, "#batch #heads #query #key"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query key"]:
        """What the values are mixed with, before dropout, all of it in memory; in float32 or wider."""
        return attention_weights(query, key, score=DotScore(self.scale), mask=mask, bias=bias, is_causal=is_causal)

    def _attend(self, query, key, value, mask, bias, is_causal):
        dropout = self.dropout if self.training else 0.0
        return fused_attention(
            query, key, value, mask=mask, bias=bias, is_causal=is_causal, dropout=dropout, scale=self.scale
        )

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        return f"scale={self.scale}, dropout={self.dropout}, compute_dtype={self.compute_dtype}"


def set_compute_dtype(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Sets `compute_dtype` of every attention call in `model`, in place; returns how many there are.

    Example:
        >>> set_compute_dtype(nn.ModuleList([DotProductAttention(), DotProductAttention()]), torch.float32)
        2
    """
    calls = [module for module in model.modules() if isinstance(module, DotProductAttention)]
    for call in calls:
        call.compute_dtype = dtype
    return len(calls)
