"""One forward pass of which nothing but attention is to be seen, at the places where it was seen before."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tameformer.patch.attention_calls import READERS
from tameformer.patch.observer import tell_apart
from tameformer.patch.places import Place
from tameformer.patch.sites import Sites


class AttentionPass(TorchFunctionMode):
    """Sees the attention that is called between `begin` and `end`; is entered only while one of the places runs.

    Args:
        sites: The places.
        tell: Called with an event's name and arguments.
        sequences: How many sequences of a batch are told of; None is all.
    """

    looks_at_attention = True

    def __init__(self, sites: Sites, tell: Callable[..., None], *, sequences: int | None) -> None:
        super().__init__()
        self.sites, self.tell, self.sequences = sites, tell, sequences
        self.attention_layers: set[str] = set()
        """Layers whose attention was seen."""
        self._running: list[Place] = []  # innermost last
        self._ran: set[nn.Module] = set()
        self._called: set[nn.Module] = set()
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Look at the places."""
        try:
            for place in self.sites.watched():
                self._watch(place)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Leave nothing on the model."""
        for handle in self._handles:
            handle.remove()
        if self._running:  # an interrupt: torch calls no hook
            self._running.clear()
            self.__exit__(None, None, None)
        self.sites.compare(self._ran, self._called)

    def _watch(self, place: Place) -> None:
        def enter(module: nn.Module, args: Any) -> None:
            self._ran.add(module)
            if not self._running:
                self.__enter__()
            self._running.append(place)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if self._running and self._running[-1] is place:  # not where a hook before `enter` failed
                self._running.pop()
                if not self._running:
                    self.__exit__(None, None, None)

        self._handles += (
            place.module.register_forward_pre_hook(enter),
            place.module.register_forward_hook(leave, always_call=True),
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reader = READERS.get(func)
        if reader is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        output = func(*args, **(kwargs or {}))
        place = self._running[-1]
        assert place.label is not None
        with torch.no_grad():
            call = reader(place.label, self.sequences, args, kwargs or {})
        if call is not None:
            self._called.add(place.module)
            self.attention_layers.add(call.layer)
            tell_apart(self.tell, call.device, "on_attention", call)
        return output
