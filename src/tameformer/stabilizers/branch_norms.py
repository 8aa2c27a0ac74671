"""The norms of residual branches taken out, and torch's nested tensors, which need layers that nobody has patched."""

from collections.abc import Sequence
from contextlib import ExitStack

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Branch
from tameformer.stabilizers.norm_removal import NoNorm, remove_norms


def remove_branch_norms(undo: ExitStack, model: nn.Module, found: Sequence[Branch], method: str) -> None:
    """Put nothing where the norm of each branch was, those around it that it ends with excepted; undone, they are back.

    Raises:
        PatchError: A norm is gone already.
    """
    places = {branch.norm.name: branch.norm for branch in found if branch.norm is not None}
    gone = [name for name, place in places.items() if isinstance(place.module, NoNorm)]
    if gone:
        raise PatchError(f"{method} would remove the norm {gone[0]}, which is removed already; undo that first")
    if places:
        remove_norms(model, lambda name, _: name in places, undo)


def without_nested_tensors(undo: ExitStack, model: nn.Module) -> None:
    """Let `torch.nn.TransformerEncoder` keep padded tensors: hooks inside its layers cannot work on nested ones.

    Of several patches that ask for it, removed in any order, the last one gives them back.
    """
    for module in model.modules():
        asked = vars(module).get(_ASKED, 0)
        if isinstance(module, nn.TransformerEncoder) and (asked or getattr(module, "use_nested_tensor", False)):
            vars(module)[_ASKED] = asked + 1
            module.use_nested_tensor = False
            undo.callback(_ask_no_more, module)


_ASKED = "patches_without_nested_tensors"


def _ask_no_more(encoder: nn.TransformerEncoder) -> None:
    vars(encoder)[_ASKED] -= 1
    if not vars(encoder)[_ASKED]:
        del vars(encoder)[_ASKED]
        encoder.use_nested_tensor = True
