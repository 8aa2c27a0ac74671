"""Fine-tuning on little data: what learns, how fast, from where, and how far it may go."""

from tameformer.finetune.freeze import GradualUnfreezing, freeze, one_by_one
from tameformer.finetune.layer_decay import LayerGroups, layer_decay_groups
from tameformer.finetune.places import Place, places

__all__ = [
    "GradualUnfreezing",
    "LayerGroups",
    "Place",
    "freeze",
    "layer_decay_groups",
    "one_by_one",
    "places",
]
