"""Mechanics for modules that we did not write: seeing what happens inside them, and where their parts sit."""

from tameformer.patch.attention_calls import AttentionCall
from tameformer.patch.blocks import blocks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.observe import Observation, Observer, unwrapped
from tameformer.patch.select import Selector, is_linear, named, select

__all__ = [
    "AttentionCall",
    "Observation",
    "Observer",
    "PatchHandle",
    "Selector",
    "blocks",
    "is_linear",
    "named",
    "select",
    "unwrapped",
]
