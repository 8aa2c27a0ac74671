"""Gradients below Adam's epsilon, whose updates vanish (Wortsman et al. 2023, arXiv:2309.14322, section 3.4)."""

from tameformer.health.detectors.low import LowQuantity
from tameformer.health.verdicts import Verdict, number, where


class VanishingGradient(LowQuantity):
    """Modules whose gradient has an RMS below epsilon in two measurements in a row; exactly 0 is no matter of epsilon.

    Args:
        below: RMS over epsilon; at 1 the update is half of what the rate says.

    Example:
        >>> detector = VanishingGradient()
        >>> detector.observe(50, {"diag/grad_rms_over_epsilon/head": 0.02})
        >>> print(detector.observe(100, {"diag/grad_rms_over_epsilon/head": 0.01}).text)
        The gradient is only 0.01 times Adam's epsilon in head since step 50: the update vanishes.
    """

    name, quantity = "vanishing_gradient", "grad_rms_over_epsilon"
    above = 0.0

    def __init__(self, below: float = 1.0) -> None:
        super().__init__(below, in_order=2 * below)

    def tell(self, value: float, places: tuple[tuple[str, tuple[int, ...]], ...], since: int) -> Verdict:
        """In words."""
        return Verdict(
            "bad", self.quantity, places, value,
            f"The gradient is only {number(value)} times Adam's epsilon in {where(places)} since step {since}: "
            f"the update vanishes.",
            "Try a lower optim.eps, such as 1e-12.", since,
        )  # fmt: skip
