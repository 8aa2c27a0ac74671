"""Mechanics for modules that we did not write: seeing what happens inside them, and where their parts sit."""

from tameformer.patch.attention_calls import AttentionCall
from tameformer.patch.blocks import blocks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.observe import Observation
from tameformer.patch.observer import Observer
from tameformer.patch.select import Selector, is_linear, named, select
from tameformer.patch.unwrapped import unwrapped

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
