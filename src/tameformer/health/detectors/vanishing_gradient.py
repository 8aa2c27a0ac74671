"""Gradients below Adam's epsilon, whose updates vanish (Wortsman et al. 2023, arXiv:2309.14322, section 3.4)."""

from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, of_quantity
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, by_layer, number, place_of, where


class VanishingGradient(Detector):
    """Modules whose gradient has an RMS below epsilon in two measurements in a row; exactly 0 is no matter of epsilon.

    Args:
        below: RMS over epsilon; at 1 the update is half of what the rate says.

    Example:
        >>> detector = VanishingGradient()
        >>> detector.observe(50, {"diag/grad_rms_over_epsilon/head": 0.02})
        >>> print(detector.observe(100, {"diag/grad_rms_over_epsilon/head": 0.01}).text)
        The gradient is only 0.01 times Adam's epsilon in head since step 50: the update vanishes.
    """

    name = "vanishing_gradient"

    def __init__(self, below: float = 1.0) -> None:
        self.below = below
        self._modules = Episodes(patience=2)

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as gradients vanish, and as the number of modules doubles."""
        sizes = of_quantity(values, "grad_rms_over_epsilon")
        if not sizes:
            return None
        found = self._modules.hear(
            step,
            beyond=[place for place, value in sizes.items() if 0 < value < self.below],
            in_order=[place for place, value in sizes.items() if value > 2 * self.below],
        )
        if not found:
            return None
        value = min(sizes[place] for place in found if place in sizes)
        since, places = min(found.values()), by_layer(place_of(place) for place in found)
        return Verdict(
            "bad", "grad_rms_over_epsilon", places, value,
            f"The gradient is only {number(value)} times Adam's epsilon in {where(places)} since step {since}: "
            f"the update vanishes.",
            "Try a lower optim.eps, such as 1e-12.", since,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return self._modules.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._modules.load(state)
