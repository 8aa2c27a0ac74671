"""Sources, exact order, and batches that do not depend on how the work is spread over workers and processes."""

from tameformer.data.curriculum import LengthCurriculum
from tameformer.data.keys import SampleKeys, split
from tameformer.data.plans import FirstBatches, Plan, SequentialBatches, ShuffledBatches
from tameformer.data.randomness import permutation, uniforms
from tameformer.data.stream import Batch, Source, single_pass, stream

__all__ = [
    "Batch",
    "FirstBatches",
    "LengthCurriculum",
    "Plan",
    "SampleKeys",
    "SequentialBatches",
    "ShuffledBatches",
    "Source",
    "permutation",
    "single_pass",
    "split",
    "stream",
    "uniforms",
]
