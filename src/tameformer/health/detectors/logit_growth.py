"""Attention logits that grow towards the size at which runs diverge (Wortsman et al. 2023, arXiv:2309.14322, section 3.1)."""

from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector, of_quantity
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, by_layer, number, place_of, where
from tameformer.limits import LOGITS_DIVERGED, LOGITS_LARGE, LOGITS_ORDINARY


class LogitGrowth(Detector):
    """Heads whose largest logit is above a limit, with how large it was at first; told again beyond 10,000.

    Args:
        above: The limit.

    Example:
        >>> detector = LogitGrowth()
        >>> detector.observe(10, {"diag/attention_logit_max/layers.1/0": 8.0})
        >>> print(detector.observe(20, {"diag/attention_logit_max/layers.1/0": 1500.0}).text.split(";")[0])
        Attention logits have grown from 8 to 1,500 in layers.1 (head 0) since step 20
    """

    name = "logit_growth"

    def __init__(self, above: float = LOGITS_LARGE) -> None:
        self.above = above
        self._large, self._diverging = Episodes(), Episodes()
        self._first: float | None = None

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict as the first heads pass the limit, and as their number doubles."""
        logits = of_quantity(values, "attention_logit_max")
        if not logits:
            return None
        if self._first is None:
            self._first = max(logits.values())
        large = _hear(self._large, step, logits, self.above)
        diverging = _hear(self._diverging, step, logits, max(self.above, LOGITS_DIVERGED))
        found = diverging or large
        if not found:
            return None
        value = max(logits[place] for place in found if place in logits)
        since, places = min(found.values()), by_layer(place_of(place) for place in found)
        grown = f"have grown from {number(self._first)} to" if value > self._first else "are"
        text = (
            f"Attention logits {grown} {number(value)} in {where(places)} since step {since}; "
            f"all runs of Wortsman et al. diverged beyond {number(LOGITS_DIVERGED)}."
        )
        advice = "Try QK-norm, QK-clip or sigmaReparam, or half the peak learning rate."
        return Verdict("bad" if diverging else "note", "attention_logit_max", places, value, text, advice, since)

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"large": self._large.state(), "diverging": self._diverging.state(), "first": self._first}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._large.load(state["large"])
        self._diverging.load(state["diverging"])
        self._first = state["first"]


def _hear(episodes: Episodes, step: int, logits: Mapping[str, float], above: float) -> dict[str, int]:
    ordinary = above * LOGITS_ORDINARY / LOGITS_LARGE
    return episodes.hear(
        step,
        beyond=[place for place, value in logits.items() if value > above],
        in_order=[place for place, value in logits.items() if value < ordinary],
    )
