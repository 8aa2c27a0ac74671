"""Attention: one score function a file, the multi-head layer around it, and the cache for generation."""

from tameformer.nn.attention.attend import Score, ScoreAttention, attend, attention_weights
from tameformer.nn.attention.cache import AttentionCache, StackCache
from tameformer.nn.attention.dot_product import DotProductAttention, set_compute_dtype
from tameformer.nn.attention.multi_head import MultiHeadAttention, check_heads
from tameformer.nn.attention.scores import AdditiveScore, GaussianScore, GeneralScore, concat_score, dot, scaled_dot

__all__ = [
    "AdditiveScore",
    "AttentionCache",
    "DotProductAttention",
    "GaussianScore",
    "GeneralScore",
    "MultiHeadAttention",
    "Score",
    "ScoreAttention",
    "StackCache",
    "attend",
    "attention_weights",
    "check_heads",
    "concat_score",
    "dot",
    "scaled_dot",
    "set_compute_dtype",
]
