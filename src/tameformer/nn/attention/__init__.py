"""Attention: one score function a file, the multi-head layer around it, and the cache for generation."""

from tameformer.nn.attention.cache import AttentionCache, StackCache
from tameformer.nn.attention.dot_product import DotProductAttention, set_compute_dtype
from tameformer.nn.attention.multi_head import MultiHeadAttention, check_heads

__all__ = [
    "AttentionCache",
    "DotProductAttention",
    "MultiHeadAttention",
    "StackCache",
    "check_heads",
    "set_compute_dtype",
]
