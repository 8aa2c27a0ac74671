"""What the detectors of a quantity that became too small have in common."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, of_quantity
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, by_layer, place_of


class LowQuantity(Detector):
    """Places where a quantity is below a limit in two measurements in a row, until it is above another.

    Args:
        below: The limit.
        in_order: From where on it is over.
    """

    quantity: str
    above: float = -math.inf
    """Values up to here mean something else, and are neither."""

    def __init__(self, below: float, in_order: float) -> None:
        self.below, self.in_order = below, in_order
        self._places = Episodes(patience=2)

    @abstractmethod
    def tell(self, value: float, places: tuple[tuple[str, tuple[int, ...]], ...], since: int) -> Verdict:
        """The verdict on the lowest value, where, and since which step."""

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as places fall below the limit, and as their number doubles."""
        found = of_quantity(values, self.quantity)
        if not found:
            return None
        low = self._places.hear(
            step,
            beyond=[place for place, value in found.items() if self.above < value < self.below],
            in_order=[place for place, value in found.items() if value > self.in_order],
        )
        if not low:
            return None
        lowest = min(found[place] for place in low if place in found)
        return self.tell(lowest, by_layer(place_of(place) for place in low), min(low.values()))

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return self._places.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._places.load(state)
