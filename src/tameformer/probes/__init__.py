"""Quantities measured inside a model while it trains, one a file; measuring never changes the run."""

from tameformer.probes.attention_entropy import AttentionEntropy

__all__ = ["AttentionEntropy"]
