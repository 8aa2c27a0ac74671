"""Quantities measured inside a model while it trains, one a file; measuring never changes the run."""

from tameformer.probes.attention_entropy import AttentionEntropy
from tameformer.probes.catalogue import PROBES, default_probes
from tameformer.probes.probe import Probe
from tameformer.probes.watch import Watch

__all__ = ["PROBES", "AttentionEntropy", "Probe", "Watch", "default_probes"]
