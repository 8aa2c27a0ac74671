"""Seeing what happens inside a model's step, without a change to the model.

Between steps nothing is on the model. While a step is observed its root carries two hooks; only while the first forward
pass of that step runs, modules carry hooks that tell who is running, and a `TorchFunctionMode` sees the calls of attention,
the sums of the residual stream and the activations. Where attention alone is wanted, the modules that call it are enough.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tameformer.patch.attention_pass import AttentionPass
from tameformer.patch.forward_pass import ForwardPass, wanted
from tameformer.patch.observer import Observer
from tameformer.patch.places import Places
from tameformer.patch.sites import Sites
from tameformer.patch.unwrapped import uncompiled, unwrapped


class Observation:
    """Lets observers see the steps of a model.

    Args:
        model: The root whose calls are forward passes; compiled and distributed ones are looked into, see `unwrapped`.
        observers: Who is told.
        optimizers: Whose steps end the observed step; without any, no gradients and updates are told.
        sequences: How many sequences of a batch `on_attention` and `on_heads` get; None is all. Of attention with one query a
            sequence `on_attention` gets 32 times as many, of a graph all.
        counts: Asked when a forward pass begins whether it is one to observe; evaluation inside a training step is not.
    """

    def __init__(
        self,
        model: nn.Module,
        observers: Sequence[Observer],
        *,
        optimizers: Sequence[Optimizer] = (),
        sequences: int | None = 1,
        counts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.model, self.observers, self.optimizers = unwrapped(model), tuple(observers), tuple(optimizers)
        self.sequences, self.counts = sequences, counts
        self.attention_layers: set[str] = set()
        """Layers whose attention was seen in any step so far."""
        self.seen_a_pass = False
        """Whether the present or last step had a forward pass that counts."""
        self._places = Places(self.model)
        self._sites = Sites(self._places)
        self._looked_at_attention = False
        self._pass: ForwardPass | AttentionPass | None = None
        self._told = self.observers
        self._undo = ExitStack()

    @contextmanager
    def watching(self, observers: Sequence[Observer] | None = None) -> Iterator[None]:
        """Let all observers, or some of them, see the step that runs inside.

        Nothing is left afterwards, also after an exception in the model or in an observer.
        """
        with ExitStack() as undo:
            self._undo, self.seen_a_pass = undo, False
            self._told = self.observers if observers is None else tuple(observers)
            undo.callback(self._end_pass)
            undo.enter_context(uncompiled())
            undo.callback(self.model.register_forward_pre_hook(self._begin_pass).remove)
            self._last_hook = self.model.register_forward_hook(self._after_pass, always_call=True)
            undo.callback(self._last_hook.remove)
            for optimizer, tell, register in self._optimizer_hooks():
                undo.callback(register(optimizer, tell).remove)
            self._tell("on_begin")
            yield

    def tell_gradients(self) -> None:
        """Tell that the gradients are complete, where no optimizer's step tells it."""
        self._tell("on_gradients")

    def unseen(self) -> list[str]:
        """Modules that are attention by their class's name but called nothing that was seen, once somebody looked."""
        return self._places.unseen(self.attention_layers) if self._looked_at_attention else []

    def _optimizer_hooks(self) -> Iterator[tuple[Optimizer, Callable[..., None], Callable[..., Any]]]:
        if not self.optimizers:
            return
        told: set[str] = set()  # an optimizer that steps twice in a step is told of once

        def gradients() -> None:
            if "gradients" not in told:
                told.add("gradients")
                self._tell("on_gradients")

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            in_place = args[1] if len(args) > 1 else None
            closure = kwargs.get("closure", in_place)
            if closure is None:
                gradients()
                return None

            def then_gradients() -> Any:  # the gradients come with the closure
                loss = closure()
                gradients()
                return loss

            args = args if in_place is None else (args[0], then_gradients, *args[2:])
            return args, kwargs if in_place is not None else {**kwargs, "closure": then_gradients}

        def update(*_: Any) -> None:
            if "update" not in told:
                told.add("update")
                self._tell("on_update")

        yield self.optimizers[0], before, type(self.optimizers[0]).register_step_pre_hook
        yield self.optimizers[-1], update, type(self.optimizers[-1]).register_step_post_hook

    @torch.no_grad()
    def _tell(self, event: str, *args: Any) -> None:
        try:
            for observer in self._told:
                getattr(observer, event)(*args)
        except BaseException:
            if self._pass is None:  # inside a forward pass the root's hook ends it
                self._undo.close()
            raise

    def _begin_pass(self, module: nn.Module, args: Any) -> None:
        if self._pass is None and not self.seen_a_pass and self.counts():
            self.seen_a_pass = True
            self._pass = self._new_pass()
            self._pass.begin()
            self._looked_at_attention |= self._pass.looks_at_attention

    def _new_pass(self) -> ForwardPass | AttentionPass:
        # Without gradients torch's layers have ways past their parts that only a look at the whole closes.
        attention_alone = wanted(self._told) == {"on_attention"} and torch.is_grad_enabled()
        if attention_alone and self._sites.suffice:
            return AttentionPass(self._sites, self._tell, sequences=self.sequences)
        return ForwardPass(
            self._places,
            self._told,
            self._tell,
            sequences=self.sequences,
            sites=self._sites if attention_alone else None,
        )

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None:
            self._end_pass()
            if output is not None:
                self._tell("on_output", output)
            elif self._last_hook.id == next(reversed(self.model._forward_hooks)):
                # The pass failed: go at once. torch is walking through the hooks, and only the last may take itself away.
                self._undo.close()

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.end()
            self.attention_layers |= self._pass.attention_layers
            self._pass = None
