"""Fine-tuning on little data: what learns, how fast, from where, and how far it may go."""

from tameformer.finetune.freeze import GradualUnfreezing, freeze, one_by_one
from tameformer.finetune.heads import check_fit
from tameformer.finetune.layer_decay import LayerGroups, layer_decay_groups, scale_rates
from tameformer.finetune.low_rank import lora
from tameformer.finetune.mixout import Mixout, mixout, per_neuron, per_weight, plain_tensors
from tameformer.finetune.places import Place, places
from tameformer.finetune.prior_decay import prior_decay
from tameformer.finetune.reinit import reinit_top

__all__ = [
    "GradualUnfreezing",
    "LayerGroups",
    "Mixout",
    "Place",
    "check_fit",
    "freeze",
    "layer_decay_groups",
    "lora",
    "mixout",
    "one_by_one",
    "per_neuron",
    "per_weight",
    "places",
    "plain_tensors",
    "prior_decay",
    "reinit_top",
    "scale_rates",
]
