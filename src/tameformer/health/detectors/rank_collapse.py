"""Tokens that become one vector (Dong et al. 2021, arXiv:2103.03404)."""

from tameformer.health.detectors.low import LowQuantity
from tameformer.health.verdicts import Verdict, number, where
from tameformer.limits import RANK_COLLAPSED, RANK_RECOVERED


class RankCollapse(LowQuantity):
    """Layers whose rank residual is below a limit in two measurements in a row.

    Args:
        below: The limit.

    Example:
        >>> detector = RankCollapse()
        >>> detector.observe(50, {"diag/rank_residual/layers.5": 0.004})
        >>> print(detector.observe(100, {"diag/rank_residual/layers.5": 0.002}).text)
        All tokens have become nearly one vector after layers.5 since step 50: their distance from rank one is 0.002.
    """

    name, quantity = "rank_collapse", "rank_residual"

    def __init__(self, below: float = RANK_COLLAPSED) -> None:
        super().__init__(below, in_order=below * RANK_RECOVERED / RANK_COLLAPSED)

    def tell(self, value: float, places: tuple[tuple[str, tuple[int, ...]], ...], since: int) -> Verdict:
        """In words."""
        return Verdict(
            "bad", self.quantity, places, value,
            f"All tokens have become nearly one vector after {where(places)} since step {since}: "
            f"their distance from rank one is {number(value)}.",
            "Check that residual connections are there; try Pre-norm, Admin, depth-scaled branches, or a lower rate.", since,
        )  # fmt: skip
