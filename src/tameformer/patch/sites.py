"""Where a model makes attention: learned in one forward pass, so that the next need be looked at nowhere else.

A look at a whole pass takes a hook on every module and a `TorchFunctionMode` that every function goes through, hardly any of
which is attention. After one whole look, hooks on the modules that called attention are enough, and on those that did not
run, in case they do; the mode is entered inside these only. The next look is a whole one again when other modules ran or
called than in the last whole one, and every tenth time in any case: a module that ran without attention and takes it up,
while all others go on as before, is seen then.
"""

from collections.abc import Set

from torch import nn

from tameformer.patch.places import Place, Places

_LOOKS_PER_WHOLE_ONE = 10


class Sites:
    """What was learned of a model.

    Args:
        places: Of the model.
    """

    def __init__(self, places: Places) -> None:
        self._places = places
        self._ran: Set[nn.Module] = frozenset()
        self._called: Set[nn.Module] = frozenset()
        self._looks_left = 0

    @property
    def suffice(self) -> bool:
        """Whether it is enough to look at these places in the next pass."""
        return self._looks_left > 0

    def watched(self) -> list[Place]:
        """The modules to look at when not at the whole, each with the name it runs under."""
        return [
            place if place.label is not None else place._replace(label=place.caller)
            for place in self._places.watched
            if place.module in self._called or place.module not in self._ran
        ]

    def learn(self, ran: Set[nn.Module], called: Set[nn.Module]) -> None:
        """Take up what a look at a whole pass saw.

        Args:
            ran: The modules that ran.
            called: Of these, the innermost ones that called attention.
        """
        self._ran, self._called = ran, called
        # The root's own calls, and a module whose name depends on who calls it, take a look at the whole.
        elsewhere = called - {place.module for place in self._places.watched}
        nameless = any(place.label is None for place in self.watched())
        self._looks_left = 0 if elsewhere or nameless or not called else _LOOKS_PER_WHOLE_ONE - 1

    def compare(self, ran: Set[nn.Module], called: Set[nn.Module]) -> None:
        """Ask for a look at the whole where a look at these places saw something else than the last whole one."""
        self._looks_left -= 1
        if not ran == called == self._called:
            self._looks_left = 0
