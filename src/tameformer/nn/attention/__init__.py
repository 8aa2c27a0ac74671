"""Attention: one score function a file, the multi-head layer around it, and the cache for generation."""

from tameformer.nn.attention.attend import Score, ScoreAttention, attend, attention_weights
from tameformer.nn.attention.cache import AttentionCache, StackCache
from tameformer.nn.attention.collaborative import CollaborativeAttention
from tameformer.nn.attention.dot_product import DotProductAttention, set_compute_dtype
from tameformer.nn.attention.linear import LinearAttention, elu_plus_one
from tameformer.nn.attention.multi_head import MultiHeadAttention, check_heads
from tameformer.nn.attention.scores import AdditiveScore, GaussianScore, GeneralScore, concat_score, dot, scaled_dot
from tameformer.nn.attention.windowed import WindowedAttention, window_mask

__all__ = [
    "AdditiveScore",
    "AttentionCache",
    "CollaborativeAttention",
    "DotProductAttention",
    "GaussianScore",
    "GeneralScore",
    "LinearAttention",
    "MultiHeadAttention",
    "Score",
    "ScoreAttention",
    "StackCache",
    "WindowedAttention",
    "attend",
    "attention_weights",
    "check_heads",
    "concat_score",
    "dot",
    "elu_plus_one",
    "scaled_dot",
    "set_compute_dtype",
    "window_mask",
]
