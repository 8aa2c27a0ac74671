"""Questions that several runs answer: `compare` settings, `race` seeds."""

from tameformer.studies.compare import compare
from tameformer.studies.race import race
from tameformer.studies.race_plan import Plan
from tameformer.studies.race_results import RaceResults
from tameformer.studies.results import Results
from tameformer.studies.statistics import interval, learning_rate_sensitivity, usable_range

__all__ = [
    "Plan",
    "RaceResults",
    "Results",
    "compare",
    "interval",
    "learning_rate_sensitivity",
    "race",
    "usable_range",
]
