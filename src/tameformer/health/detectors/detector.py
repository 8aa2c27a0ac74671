"""What a detector is: a function of the measurements so far that says something now and then."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from tameformer.health.verdicts import Verdict


class Detector(ABC):
    """Looks at the measurements of a run, line by line, for one kind of trouble.

    Equal measurements give equal verdicts, also when `state` and `load` lie between them. A value that is not finite enters
    no statistic and no comparison.
    """

    name: str
    """In configurations, events and checkpoints."""

    @abstractmethod
    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict, when these measurements begin an episode of trouble; None otherwise.

        Args:
            step: Completed steps; the same step may be told of in several parts.
            values: Measurements by the keys of the run folder: `train/...`, `eval/...`, `perf/...`, `diag/...`.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, with the same verdicts."""


def of_quantity(values: Mapping[str, float], quantity: str) -> dict[str, float]:
    """The finite values of one quantity, by `<layer>[/<head>]`.

    Example:
        >>> of_quantity({"diag/rank_residual/layers.0": 0.5, "diag/rank_residual/layers.1": math.nan}, "rank_residual")
        {'layers.0': 0.5}
    """
    prefix = f"diag/{quantity}/"
    return {
        key[len(prefix) :]: value for key, value in values.items() if key.startswith(prefix) and math.isfinite(value)
    }


def finite(values: Mapping[str, float], key: str) -> float | None:
    """The value, when there is one and it is finite."""
    value = values.get(key, math.nan)
    return value if math.isfinite(value) else None
