"""Layers that do not learn: from the start on, or until their turn comes (Howard and Ruder 2018, arXiv:1801.06146, 3.3)."""

from collections.abc import Callable
from contextlib import ExitStack

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tameformer.errors import PatchError
from tameformer.finetune.places import PlaceOf, num_layers, places
from tameformer.patch import PatchHandle

Unfreezing = Callable[[int], int]
"""From the step, counted from 0, to how many layers from the top learn; what is after the layers always does."""


def freeze(model: nn.Module, *, up_to: int, place_of: PlaceOf = places) -> PatchHandle:
    """Let the embeddings and the first `up_to` layers keep their values; call it before the optimizer is built.

    With `up_to=0` the embeddings are frozen, with all layers only what is after them learns. A head that is tied to the
    embeddings is frozen with them. `remove` and the end of a `with` let everything learn again that did before; `bake` leaves
    it frozen.

    Raises:
        ValueError: The model has fewer layers.
        PatchError: The model has no repeated layers, or nothing is left to learn.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
        >>> handle = freeze(model, up_to=1)
        >>> [name for name, one in model.named_parameters() if one.requires_grad][0]
        '1.layers.1.self_attn.in_proj_weight'
    """
    found = place_of(model)
    if not 0 <= up_to <= num_layers(found):
        raise ValueError(f"expected up_to from 0 to {num_layers(found)}, the number of layers, got {up_to}")
    chosen = {
        name: one
        for name, one in model.named_parameters()
        if found[name].below < up_to and found[name].above > 0 and one.requires_grad
    }
    if len(chosen) == sum(one.requires_grad for one in model.parameters()):
        raise PatchError(f"freezing {up_to} layers leaves nothing of {type(model).__name__} to learn; freeze fewer")
    with ExitStack() as undo:
        for one in chosen.values():
            undo.callback(one.requires_grad_, True)
            one.requires_grad_(False)
        kept = undo.pop_all()
    return PatchHandle("freeze", tuple(chosen), kept, bake=lambda: None, settings={"up_to": up_to})


def one_by_one(step: int, *, steps_per_layer: int) -> int:
    """First what is after the layers, then one layer more from the top every `steps_per_layer` steps; embeddings last.

    Example:
        >>> [one_by_one(step, steps_per_layer=10) for step in (0, 9, 10, 25)]
        [0, 0, 1, 2]
    """
    return step // steps_per_layer


class GradualUnfreezing:
    """Layers that begin to learn from the top down; call `at(step)` before the forward pass of each step.

    What learns is a function of the step alone, so that a resumed run needs no state. Build the optimizer first, while
    everything is trainable; an optimizer leaves alone what has no gradient. `DistributedDataParallel` waits for gradients of
    all that was trainable when it was wrapped, unless it was told `find_unused_parameters=True`; FSDP2 does not wait.

    Args:
        model: Any model with repeated layers. What is frozen already stays so.
        schedule: From the step to the number of layers that learn; one more than there are lets the embeddings learn, too.
        place_of: Where each parameter is.

    Raises:
        PatchError: The model has no repeated layers, or is wrapped in what waits for all of them.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
        >>> unfreezing = GradualUnfreezing(model, lambda step: step // 100)
        >>> unfreezing.at(0), unfreezing.at(250), unfreezing.at(300)
        (('head',), ('1.layers.0', '1.layers.1', 'head'), ('embeddings', '1.layers.0', '1.layers.1', 'head'))
    """

    def __init__(self, model: nn.Module, schedule: Unfreezing, *, place_of: PlaceOf = places) -> None:
        if isinstance(model, DistributedDataParallel) and not model.find_unused_parameters:
            raise PatchError(
                "DistributedDataParallel waits for the gradients of frozen layers, too; wrap with find_unused_parameters=True"
            )
        found = place_of(model)
        self._schedule = schedule
        self._parameters = [(found[name], one) for name, one in model.named_parameters() if one.requires_grad]

    def at(self, step: int) -> tuple[str, ...]:
        """Let learn what learns in this step; returns its layers, from the input to the output."""
        learning = self._schedule(step)
        layers: dict[str, None] = {}
        for place, one in sorted(self._parameters, key=lambda item: -item[0].above):
            if place.above <= learning:
                layers[place.layer] = None
            one.requires_grad_(place.above <= learning)
            if place.above > learning:
                one.grad = None
        return tuple(layers)

    def remove(self) -> None:
        """Let everything learn again."""
        for _, one in self._parameters:
            one.requires_grad_(True)
