"""Questions that several runs answer: `compare` first."""

from tameformer.studies.compare import compare
from tameformer.studies.results import Results
from tameformer.studies.statistics import interval, learning_rate_sensitivity, usable_range

__all__ = ["Results", "compare", "interval", "learning_rate_sensitivity", "usable_range"]
