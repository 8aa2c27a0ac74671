"""The one place where a string of a configuration becomes code."""

from functools import partial

import torch.nn.functional as F

from tameformer.nn.feed_forward import FeedForward, GatedFeedForward, gated_hidden_dim, plain_hidden_dim
from tameformer.nn.norms import layer_norm, rms_norm
from tameformer.nn.pooling import AttentionPooling, ClassTokenPooling, MaxPooling, MeanPooling, SoftmaxPooling
from tameformer.nn.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
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
    "added_positions": {
        "sinusoidal": SinusoidalPositions,
        "learned": LearnedPositions,
        "rotary": None,
        "none": None,
    },
    "turned_positions": {"sinusoidal": None, "learned": None, "rotary": RotaryPositions, "none": None},
    "pooling": {
        "class_token": ClassTokenPooling,
        "mean": MeanPooling,
        "max": MaxPooling,
        "attention": AttentionPooling,
        "softmax": SoftmaxPooling,
    },
    "stem": {"patch": PatchStem, "convolution": ConvolutionStem},
}
