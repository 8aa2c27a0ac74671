"""Top layers that start afresh (Zhang et al. 2021, "Revisiting Few-sample BERT Fine-tuning", arXiv:2006.05987, section 4).

The top layers of a pretrained model are the most specialized in what it was pretrained on. They, and the pooler and head above
them, get new starting values; the paper tries 1 to 6 layers.

Differs from the published code: the values are those that the model's own initializer gives, with what it makes of depth, and
not a fixed deviation of 0.02; any model with repeated layers will do.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tameformer.errors import PatchError
from tameformer.finetune.places import PlaceOf, num_layers, places
from tameformer.models import Decoder, Encoder, EncoderDecoder, MaskedLanguageModel, TextClassifier, VisionClassifier
from tameformer.models.initialize import gpt2_init, vit_init, xavier_init
from tameformer.nn.pooling import AttentionPooling
from tameformer.tensors import is_sharded

logger = logging.getLogger(__name__)
Fresh = Callable[[nn.Module], nn.Module]
"""From a model to one of the same class and shapes with fresh weights, drawn from torch's global generator on the processor."""


def reinit_top(
    model: nn.Module,
    *,
    layers: int,
    head: bool = True,
    seed: int = 0,
    fresh: Fresh | None = None,
    place_of: PlaceOf = places,
) -> tuple[str, ...]:
    """Give the top layers, and what is after them, the starting values of an untrained model; all else keeps its bits.

    Call it before patches and optimizers. For a while a second copy of the model is in memory. A head that is tied to the
    embeddings is not touched, since they are below.

    Args:
        model: Any model with repeated layers.
        layers: How many, from the top; where lists of layers run side by side, that many of each.
        head: Whether also what is after the layers: the last norm, pooler, head.
        seed: Of the new values; the global generator is left as it was.
        fresh: Builds an untrained model; None knows Hugging Face models, ours, those with `init_weights()` such as timm's, and
            whatever is made of modules with `reset_parameters`.
        place_of: Where each parameter is.

    Returns:
        The names of the parameters that were drawn anew.

    Raises:
        ValueError: The model has fewer layers, or parameters that nobody knows how to draw.
        PatchError: One of the layers is patched already, or sharded.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
        >>> reinit_top(model, layers=0)
        ('2.weight', '2.bias')
    """
    found = place_of(model)
    if not 0 <= layers <= num_layers(found):
        raise ValueError(f"expected layers from 0 to {num_layers(found)}, how many there are, got {layers}")
    chosen = [name for name, place in found.items() if (1 - head) <= place.above <= layers]
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in chosen}
    for name, owner in owners.items():
        if isinstance(owner, parametrize.ParametrizationList) or parametrize.is_parametrized(owner):
            raise PatchError(f"{name} is part of a patch; remove it, re-initialize, and patch then")
        if is_sharded(owner.get_parameter(name.rpartition(".")[2])):
            raise PatchError(f"{name} is sharded over processes; re-initialize first, then shard")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = (fresh or _fresh)(model)
    given, parameters = dict(twin.named_parameters()), dict(model.named_parameters())
    undrawn = [name for name in chosen if given[name].isnan().any()]
    if undrawn:
        kinds = ", ".join(dict.fromkeys(type(owners[name]).__name__ for name in undrawn))
        raise ValueError(
            f"{', '.join(undrawn)}: {kinds} has no reset_parameters; give fresh=, which builds an untrained model"
        )
    with torch.no_grad():
        for name in chosen:
            parameters[name].copy_(given[name])
        for path in dict.fromkeys(name.rpartition(".")[0] for name in chosen):  # the statistics of batch norms
            for buffer, value in model.get_submodule(path).named_buffers(recurse=False):
                value.copy_(twin.get_submodule(path).get_buffer(buffer))
    logger.info("re-initialized %d parameters: %s", len(chosen), ", ".join(chosen))
    return tuple(chosen)


def _fresh(model: nn.Module) -> nn.Module:
    """An untrained model; what nobody knows how to draw is NaN in it."""
    if any(parent.__name__ == "PreTrainedModel" for parent in type(model).__mro__):
        known: Any = model
        return type(known)(copy.deepcopy(known.config))
    twin = copy.deepcopy(model).cpu()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.fill_(torch.nan)
    for module in _bottom_up(twin):
        reset: Any = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is not None:
            reset()
        elif isinstance(module, AttentionPooling):
            nn.init.zeros_(module.score)
    for kind, initialize in _INITIALIZERS.items():
        if isinstance(twin, kind):
            initialize(twin)
    own: Any = getattr(twin, "init_weights", None)
    if own is not None:
        own()
    return twin


_INITIALIZERS: dict[type[nn.Module], Callable[[nn.Module], None]] = {
    Decoder: gpt2_init,
    Encoder: gpt2_init,
    EncoderDecoder: xavier_init,
    MaskedLanguageModel: gpt2_init,
    TextClassifier: gpt2_init,
    VisionClassifier: vit_init,
}


def _bottom_up(module: nn.Module) -> list[nn.Module]:
    """A module after its parts: some reset the parts, too, in a way of their own."""
    return [*(one for child in module.children() for one in _bottom_up(child)), module]
