"""Scaled dot-product attention as a module of its own (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

Every attention layer calls it through this one module, so that a forward pre-hook sees queries, keys, values and mask
of any layer without knowing the layer, and another score function is another class with the same `forward`.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tameformer.shapes import Mask


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
        is_causal: bool = False,
    ) -> Float[Tensor, "batch heads query value_dim"]:
        """The values mixed for each query; zeros for a query that may attend to nothing.

        `is_causal` lets query i attend to keys 0..i and needs no mask in memory; it excludes `mask`.
        Each of `kv_heads` keys and values serves `heads / kv_heads` neighbouring query heads.

        Raises:
            ValueError: both `mask` and `is_causal` are given.
        """
        if is_causal and mask is not None:
            raise ValueError(
                "expected either mask or is_causal=True, got both; put the causal part into the mask: "
                "mask & causal_mask(query_length, key_length)"
            )
        device_type = query.device.type
        if self.compute_dtype is None or not torch.is_autocast_enabled(device_type):
            return self._attend(query, key, value, mask, is_causal)
        query, key = query.to(self.compute_dtype), key.to(self.compute_dtype)
        with torch.autocast(device_type, enabled=False):
            return self._attend(query, key, value.to(self.compute_dtype), mask, is_causal).to(value.dtype)

    def _attend(self, query, key, value, mask, is_causal):
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,
            enable_gqa=key.shape[1] != query.shape[1],
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
