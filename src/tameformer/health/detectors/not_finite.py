"""Measurements that stop being numbers, inside the model or in an evaluation; loss and gradient norm are the guard's."""

import math
from collections.abc import Mapping
from typing import Any

from tameformer.health.detectors.detector import Detector
from tameformer.health.verdicts import Verdict, by_layer, place_of, where


class NotFinite(Detector):
    """A quantity that was finite becomes NaN or infinite.

    A quotient is 0/0 until there is something to divide, as in a branch that starts at zero: what is not finite in a
    quantity's first measurement is no trouble before it has been finite once.

    Example:
        >>> detector = NotFinite()
        >>> detector.observe(10, {"diag/activation_rms/layers.0": 1.0})
        >>> print(detector.observe(20, {"diag/activation_rms/layers.0": math.nan}).text)
        The activation rms is nan in layers.0 at step 20.
    """

    name = "not_finite"

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._excused: set[str] = set()
        self._told: set[str] = set()

    def observe(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        """A verdict on the first quantity that breaks here; over when all of that quantity is finite."""
        broken: dict[str, dict[str, float]] = {}
        new: set[str] = set()
        for key, value in values.items():
            quantity = _quantity(key)
            if quantity is None:
                continue
            if quantity not in self._known:
                new.add(quantity)
            if math.isfinite(value):
                self._excused.discard(key)
                broken.setdefault(quantity, {})
            elif quantity in new:
                self._excused.add(key)
            elif key not in self._excused:
                broken.setdefault(quantity, {})[key] = value
        self._known |= new
        self._told -= {quantity for quantity, keys in broken.items() if not keys}
        found = [quantity for quantity, keys in broken.items() if keys and quantity not in self._told]
        if not found:
            return None
        self._told |= set(found)
        keys = broken[found[0]]
        value = next(iter(keys.values()))
        name = _words(found[0])
        others = f", and so {'is' if len(found) == 2 else 'are'} {', '.join(map(_words, found[1:]))}" * (len(found) > 1)
        if found[0].startswith("eval/"):
            places, at = (), ""
        else:
            places = by_layer(place_of(key.split("/", 2)[2]) for key in keys)
            at = f" in {where(places)}"
        return Verdict(
            "bad", found[0], places, value, f"The {name} is {value}{at} at step {step}{others}.",
            "Look for the first layer that gives one; try attention and norms in float32, or a lower optim.peak_lr.",
            step, "certain",
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Plain numbers, and names of quantities."""
        return {"known": sorted(self._known), "excused": sorted(self._excused), "told": sorted(self._told)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._known, self._excused, self._told = set(state["known"]), set(state["excused"]), set(state["told"])


def _quantity(key: str) -> str | None:
    if key.startswith("diag/"):
        return key.split("/", 2)[1]
    return key if key.startswith("eval/") else None


def _words(quantity: str) -> str:
    return quantity.replace("_", " ").replace("eval/", "evaluation ")
