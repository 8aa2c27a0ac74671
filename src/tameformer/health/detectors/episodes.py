"""When to speak: once as trouble begins, again only as it spreads, and not before it is over about the next one."""

from collections.abc import Collection, Mapping
from typing import Any


class Episodes:
    """The places that are in trouble now, and what was said about them.

    A place is in trouble after `patience` measurements in a row beyond its limit, until one that is back in order; between
    the two limits nothing changes. Trouble is told when it begins at any place, and again each time that there are
    twice as many places: sixteen heads that follow each other are told five times, not sixteen.

    Example:
        >>> episodes = Episodes()
        >>> episodes.hear(10, beyond=["a"], in_order=["b"]), episodes.hear(20, beyond=["a"], in_order=["b"])
        ({'a': 10}, {})
        >>> episodes.hear(30, beyond=["a", "b"], in_order=[])
        {'a': 10, 'b': 30}
    """

    def __init__(self, *, patience: int = 1) -> None:
        self.patience = patience
        self._since: dict[str, int] = {}
        self._count: dict[str, int] = {}
        self._told = 0

    def hear(self, step: int, *, beyond: Collection[str], in_order: Collection[str]) -> dict[str, int]:
        """All places in trouble with the step it began at, when that is to be told; nothing otherwise.

        Args:
            step: Of the measurement.
            beyond: Places whose value is beyond the limit.
            in_order: Places whose value is in order again; those in neither stay as they are.
        """
        self.note(step, beyond=beyond, in_order=in_order)
        found = self.open()
        if len(found) >= max(1, 2 * self._told):
            self._told = len(found)
            return found
        return {}

    def note(self, step: int, *, beyond: Collection[str], in_order: Collection[str]) -> None:
        """Take the measurement in, and say nothing."""
        for place in in_order:
            self._since.pop(place, None)
            self._count.pop(place, None)
        for place in [place for place, count in self._count.items() if count < self.patience and place not in beyond]:
            del self._since[place], self._count[place]  # not in a row
        for place in beyond:
            self._since.setdefault(place, step)
            self._count[place] = min(self._count.get(place, 0) + 1, self.patience)
        if not self.open():
            self._told = 0

    def open(self) -> dict[str, int]:
        """The places in trouble, with the step it began at."""
        return {place: since for place, since in self._since.items() if self._count[place] >= self.patience}

    def state(self) -> dict[str, Any]:
        """Plain numbers."""
        places = {place: [since, self._count[place]] for place, since in self._since.items()}
        return {"places": places, "told": self._told}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        self._since = {place: since for place, (since, _) in state["places"].items()}
        self._count = {place: count for place, (_, count) in state["places"].items()}
        self._told = state["told"]
