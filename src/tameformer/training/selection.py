"""Which evaluation was the best so far, and whether it is time to stop."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tameformer.errors import ConfigError


@dataclass
class Selection:
    """The best value of one metric; a non-finite value is never the best."""

    metric: str | None
    mode: str = "min"
    best: float | None = None
    best_step: int | None = None
    evaluations_since: int = 0

    def update(self, step: int, values: Mapping[str, float]) -> bool:
        """Take one evaluation; returns whether it is the best so far.

        Raises:
            ConfigError: The metric is not among the values.
        """
        if self.metric is None:
            return False
        if self.metric not in values:
            raise ConfigError(
                f"checkpoint.best_metric is {self.metric}, which is not measured; choose one of {', '.join(sorted(values))}"
            )
        value = values[self.metric]
        sign = 1.0 if self.mode == "min" else -1.0
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
            self.best, self.best_step, self.evaluations_since = value, step, 0
            return True
        self.evaluations_since += 1
        return False

    def exhausted(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row brought nothing better."""
        return patience is not None and self.metric is not None and self.evaluations_since >= patience
