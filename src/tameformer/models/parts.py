"""The one place where a string of a configuration becomes code."""

from functools import partial

import torch.nn.functional as F

from tameformer.nn.attention import (
    AdditiveScore,
    GaussianScore,
    GeneralScore,
    LinearAttention,
    WindowedAttention,
    concat_score,
    dot,
)
from tameformer.nn.feed_forward import FeedForward, GatedFeedForward, gated_hidden_dim, plain_hidden_dim
from tameformer.nn.norms import layer_norm, rms_norm
from tameformer.nn.pooling import AttentionPooling, ClassTokenPooling, MaxPooling, MeanPooling, SoftmaxPooling
from tameformer.nn.positions import (
    AlibiPositions,
    BinaryPositions,
    BucketedPositions,
    DisentangledPositions,
    LearnedPositions,
    RotaryPositions,
    ShawPositions,
    SinusoidalPositions,
)
from tameformer.nn.residual import NoNorm, PeriNorm, PostNorm, PreNorm
from tameformer.nn.stems import ConvolutionStem, PatchStem

PARTS = {
    "norm": {"layer_norm": layer_norm, "rms_norm": rms_norm},
    "residual": {"pre": PreNorm, "post": PostNorm, "peri": PeriNorm, "none": NoNorm},
    "activation": {
        "relu": partial(FeedForward, activation=F.relu),
        "gelu": partial(FeedForward, activation=F.gelu),
        "swiglu": partial(GatedFeedForward, activation=F.silu),
    },
    "hidden_dim": {"relu": plain_hidden_dim, "gelu": plain_hidden_dim, "swiglu": gated_hidden_dim},
    "added_positions": {"sinusoidal": SinusoidalPositions, "learned": LearnedPositions, "binary": BinaryPositions},
    "turned_positions": {"rotary": RotaryPositions},
    "relative_positions": {
        "relative": lambda heads, head_dim, length: ShawPositions(head_dim, max_distance=min(16, length)),
        "disentangled": lambda heads, head_dim, length: DisentangledPositions(
            heads, head_dim, max_distance=min(512, length)
        ),
        "alibi": lambda heads, head_dim, length: AlibiPositions(heads),
        "t5": lambda heads, head_dim, length: BucketedPositions(heads),
    },
    "score": {
        "scaled_dot": None,  # its own module, with more than a score has
        "dot": lambda heads, head_dim: dot,
        "general": GeneralScore,
        "additive": AdditiveScore,
        "concat": concat_score,
        "gaussian": lambda heads, head_dim: GaussianScore(bandwidth=head_dim**0.25),  # the scale of scaled dot
    },
    "attend": {
        "full": lambda config: None,
        "windowed": lambda config: WindowedAttention(config.radius, dropout=config.attention_dropout),
        "linear": lambda config: LinearAttention(),
    },
    "pooling": {
        "class_token": ClassTokenPooling,
        "mean": MeanPooling,
        "max": MaxPooling,
        "attention": AttentionPooling,
        "softmax": SoftmaxPooling,
    },
    "stem": {"patch": PatchStem, "convolution": ConvolutionStem},
}
