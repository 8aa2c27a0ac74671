"""One object for every change to a model that we did not write: what was changed, and the way back."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from tameformer.errors import PatchError


class PatchHandle:
    """A change to a model that can be taken back exactly, or folded into plain weights.

    Used in a `with` statement it is removed at the end, also after an exception.

    Args:
        method: The name of the method, such as "sigma_reparam".
        names: The modules or parameters that were changed, by the names they have in the model.
        undo: Puts everything back; called once, by `remove`.
        bake: Folds the change into the plain weights that stay; None where the method has no such form.
        new_parameters: What the change added for an optimizer to train: patch first, then build the optimizer.
        settings: What the method was called with, as plain values: applying it again with them rebuilds the change, so that
            a checkpoint of the changed model can be loaded.
    """

    def __init__(
        self,
        method: str,
        names: Sequence[str],
        undo: ExitStack,
        *,
        bake: Callable[[], None] | None = None,
        new_parameters: Sequence[nn.Parameter] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.method, self.names, self.new_parameters = method, tuple(names), tuple(new_parameters)
        self.settings = dict(settings or {})
        self._undo: ExitStack | None = undo
        self._bake = bake

    @property
    def is_active(self) -> bool:
        """Whether the change is still on the model."""
        return self._undo is not None

    def remove(self) -> None:
        """Put the model back as it was: the same parameters with the values they have now, in their order, and no more.

        Raises:
            PatchError: It was removed or baked before.
        """
        self._taken("remove").close()

    def bake(self) -> None:
        """Keep the effect and drop the machinery: afterwards the model is an ordinary one with the same outputs.

        Raises:
            PatchError: It was removed or baked before, or the method cannot be folded into this model.
        """
        if self._bake is None:
            raise PatchError(f"{self.method} cannot be folded into plain weights; remove it, or keep it")
        if self._undo is None:
            self._taken("bake")
        self._bake()  # may refuse, and then nothing has happened
        self._undo = None

    def _taken(self, verb: str) -> ExitStack:
        undo, self._undo = self._undo, None
        if undo is None:
            raise PatchError(f"cannot {verb} {self.method}: it was removed or baked before; apply it anew")
        return undo

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_active:
            self.remove()

    def __repr__(self) -> str:
        state = "" if self.is_active else ", no longer on the model"
        return f"PatchHandle({self.method}, {len(self.names)} places, {len(self.new_parameters)} new parameters{state})"
