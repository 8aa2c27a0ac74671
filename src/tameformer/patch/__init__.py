"""Mechanics for modules that we did not write: seeing what happens inside them, and where their parts sit."""

from tameformer.patch.attention_calls import AttentionCall
from tameformer.patch.blocks import blocks
from tameformer.patch.observe import Observation, Observer, unwrapped

__all__ = ["AttentionCall", "Observation", "Observer", "blocks", "unwrapped"]
