"""The attentions of a model, for the methods that act on their logits."""

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Attention, branches
from tameformer.patch.select import Selector


def chosen_attentions(model: nn.Module, where: Selector | None) -> list[Attention]:
    """The attentions that `where` takes by name and module, layer by layer; None takes all.

    Raises:
        PatchError: There is none.
    """
    found = [branch.attention for branch in branches(model) if branch.attention is not None]
    taken = [attention for attention in found if where is None or where(attention.name, attention.module)]
    if not taken:
        raise PatchError(f"where= takes no attention; there are {', '.join(attention.name for attention in found)}")
    return taken
