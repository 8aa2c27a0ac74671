"""What happens in a run, in order, and who is told.

on_train_begin
for each step:
train_step                      forward, backward, clip, update
on_log                          every `logging_steps`: measurements since the last line
on_evaluate                     every `eval_steps`, or at the end of each epoch
on_save                         after a checkpoint is published
on_rollback                     the run stands at a checkpoint again
on_train_end
on_event                            anything out of the ordinary, in one sentence
"""

from collections.abc import Mapping
from typing import Any


class Listener:
    """Told of what happens; changes nothing. Override what is of interest."""

    def on_train_begin(self, *, start_step: int, max_steps: int) -> None:
        """The first step is about to run."""

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """A line of measurements, by slash-separated key; `step` counts completed steps."""

    def on_probe(self, step: int, values: Mapping[str, float]) -> None:
        """Measurements inside the model, by `diag/<probe>/<layer>[/<head>]`."""

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics on held-out data."""

    def on_save(self, step: int) -> None:
        """A checkpoint of this step exists, whole."""

    def on_event(self, step: int, kind: str, message: str, details: Mapping[str, Any]) -> None:
        """Something worth telling a person."""

    def on_rollback(self, step: int) -> None:
        """The run stands after this step again; what was told of later ones is void."""

    def on_train_end(self, step: int) -> None:
        """No step follows; also called when an exception ends the run."""


class Listeners(Listener):
    """Tells several listeners, in order."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = list(listeners)

    def put_first(self, *listeners: Listener) -> None:
        """Tell these before those there are."""
        self.listeners[:0] = listeners

    def on_train_begin(self, *, start_step: int, max_steps: int) -> None:
        for listener in self.listeners:
            listener.on_train_begin(start_step=start_step, max_steps=max_steps)

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        for listener in self.listeners:
            listener.on_log(step, values)

    def on_probe(self, step: int, values: Mapping[str, float]) -> None:
        for listener in self.listeners:
            listener.on_probe(step, values)

    def on_evaluate(self, step: int, values: Mapping[str, float]) -> None:
        for listener in self.listeners:
            listener.on_evaluate(step, values)

    def on_save(self, step: int) -> None:
        for listener in self.listeners:
            listener.on_save(step)

    def on_event(self, step: int, kind: str, message: str, details: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener.on_event(step, kind, message, details)

    def on_rollback(self, step: int) -> None:
        for listener in self.listeners:
            listener.on_rollback(step)

    def on_train_end(self, step: int) -> None:
        for listener in self.listeners:
            listener.on_train_end(step)
