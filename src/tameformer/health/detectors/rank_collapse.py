"""Tokens that become one vector (Dong et al. 2021, arXiv:2103.03404)."""

from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, of_quantity
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, by_layer, number, place_of, where
from tameformer.limits import RANK_COLLAPSED, RANK_RECOVERED


class RankCollapse(Detector):
    """Layers whose rank residual is below a limit in two measurements in a row.

    Args:
        below: The limit.

    Example:
        >>> detector = RankCollapse()
        >>> detector.observe(50, {"diag/rank_residual/layers.5": 0.004})
        >>> print(detector.observe(100, {"diag/rank_residual/layers.5": 0.002}).text)
        All tokens have become nearly one vector after layers.5 since step 50: their distance from rank one is 0.002.
    """

    name = "rank_collapse"

    def __init__(self, below: float = RANK_COLLAPSED) -> None:
        self.below, self.recovered = below, below * RANK_RECOVERED / RANK_COLLAPSED
        self._layers = Episodes(patience=2)

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as layers collapse, and as their number doubles."""
        residuals = of_quantity(values, "rank_residual")
        if not residuals:
            return None
        found = self._layers.hear(
            step,
            beyond=[place for place, value in residuals.items() if value < self.below],
            in_order=[place for place, value in residuals.items() if value > self.recovered],
        )
        if not found:
            return None
        value = min(residuals[place] for place in found if place in residuals)
        since, places = min(found.values()), by_layer(place_of(place) for place in found)
        return Verdict(
            "bad", "rank_residual", places, value,
            f"All tokens have become nearly one vector after {where(places)} since step {since}: "
            f"their distance from rank one is {number(value)}.",
            "Check that residual connections are there; try Pre-norm, Admin, depth-scaled branches, or a lower rate.", since,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return self._layers.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._layers.load(state)
