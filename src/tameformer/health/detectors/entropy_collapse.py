"""Attention that collapses onto few keys (Zhai et al. 2023, arXiv:2303.06296, section 3).

Single sharp heads are ordinary in a run that learns: a language model has heads that look at the token before and nowhere
else. So a head counts where the training loss left its course soon after it had sharpened; all heads together count by
themselves, because no run in order was seen with a mean entropy below a tenth of its ceiling (docs/entropy_collapse.md).
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from tameformer.health.detectors.course import LossCourse
from tameformer.health.detectors.detector import Detector, finite, of_quantity
from tameformer.health.detectors.episodes import Episodes
from tameformer.health.verdicts import Verdict, by_layer, number, place_of, where
from tameformer.limits import ENTROPY_COLLAPSED, ENTROPY_RECOVERED, RECENT_SHARE, RECENT_STEPS


class EntropyCollapse(Detector):
    """Heads whose entropy is below a share of its ceiling, where the loss rose after it or all heads are.

    Args:
        below: The share.

    Example:
        >>> detector, ceiling = EntropyCollapse(), {"diag/attention_entropy_max/a": 4.0}
        >>> detector.observe(10, {"diag/attention_entropy/a/0": 3.0, "diag/attention_entropy/a/1": 3.0, **ceiling})
        >>> found = detector.observe(20, {"diag/attention_entropy/a/0": 0.1, "diag/attention_entropy/a/1": 0.2, **ceiling})
        >>> print(found.text)
        Attention rests on few keys in a (heads 0 and 1) since step 20: entropy down to 0.025 of its ceiling, 0.0375 on average.
    """

    name = "entropy_collapse"

    def __init__(self, below: float = ENTROPY_COLLAPSED) -> None:
        self.below = below
        self.recovered = below * ENTROPY_RECOVERED / ENTROPY_COLLAPSED
        self._heads, self._course = Episodes(), LossCourse()
        self._told = False

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict once a collapse; over when no head is collapsed any more, or the loss is back and the mean up."""
        loss = finite(values, "train/loss")
        if loss is not None:
            self._course.add(step, loss)
        shares = _shares(values)
        if not shares:
            return None
        self._heads.note(
            step,
            beyond=[place for place, share in shares.items() if share < self.below],
            in_order=[place for place, share in shares.items() if share > self.recovered],
        )
        collapsed, mean, risen = self._heads.open(), fmean(shares.values()), self._course.risen_since
        if risen is not None:
            oldest = risen - max(RECENT_SHARE * risen, RECENT_STEPS)
            blamed = {place: since for place, since in collapsed.items() if oldest <= since <= risen}
        else:
            blamed = {}
        if mean < self.below:
            blamed = collapsed
        if self._told:
            self._told = bool(collapsed) and (mean < self.recovered or risen is not None)
            return None
        if not blamed:
            return None
        self._told = True
        return self._verdict(blamed, min(shares[place] for place in blamed if place in shares), mean, risen)

    def _verdict(self, blamed: Mapping[str, int], lowest: float, mean: float, risen: int | None) -> Verdict:
        since = min(blamed.values())
        places = by_layer(place_of(place) for place in blamed)
        text = (
            f"Attention rests on few keys in {where(places)} since step {since}: entropy down to {number(lowest)} of its "
            f"ceiling, {number(mean)} on average"
        )
        lead = "" if risen is None or risen < since else f", {risen - since} steps before the loss rose"
        return Verdict(
            "bad", "attention_entropy", places, lowest, f"{text}{lead}.",
            "Try half the peak learning rate, a longer warm-up, QK-norm or sigmaReparam.", since,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"heads": self._heads.state(), "course": self._course.state(), "told": self._told}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._heads.load(state["heads"])
        self._course.load(state["course"])
        self._told = state["told"]


def _shares(values: Mapping[str, float]) -> dict[str, float]:
    """Entropy over its ceiling, a head; heads without a ceiling, or that see one key only, are not judged."""
    ceilings = of_quantity(values, "attention_entropy_max")
    entropies = of_quantity(values, "attention_entropy")
    of_layers = {place: ceilings.get(place_of(place)[0], 0.0) for place in entropies}
    return {place: entropies[place] / ceiling for place, ceiling in of_layers.items() if ceiling > 0}
