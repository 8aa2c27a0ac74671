"""Where a token stands: vectors added to the embeddings, turns of queries and keys, or biases by distance on the logits."""

from tameformer.nn.positions.alibi import AlibiPositions, alibi_slopes
from tameformer.nn.positions.binary import BinaryPositions, binary_table
from tameformer.nn.positions.buckets import BucketedPositions, t5_buckets
from tameformer.nn.positions.disentangled import DisentangledPositions, log_buckets
from tameformer.nn.positions.learned import LearnedPositions
from tameformer.nn.positions.relative import RelativePositions, distances
from tameformer.nn.positions.rotary import RotaryPositions, rotary_angles, rotate
from tameformer.nn.positions.shaw import ShawPositions
from tameformer.nn.positions.sinusoidal import SinusoidalPositions, sinusoidal_table

__all__ = [
    "AlibiPositions",
    "BinaryPositions",
    "BucketedPositions",
    "DisentangledPositions",
    "LearnedPositions",
    "RelativePositions",
    "RotaryPositions",
    "ShawPositions",
    "SinusoidalPositions",
    "alibi_slopes",
    "binary_table",
    "distances",
    "log_buckets",
    "rotary_angles",
    "rotate",
    "sinusoidal_table",
    "t5_buckets",
]
