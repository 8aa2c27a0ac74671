"""Starting values, one function a recipe, each in place and from torch's global generator.

Norms and class tokens keep what their modules set. Biases become zero.
"""

import math
from collections.abc import Callable

from torch import nn

from tameformer.nn.attention import CollaborativeAttention, MultiHeadAttention
from tameformer.nn.embedding import OutputHead, TokenEmbedding
from tameformer.nn.feed_forward import FeedForward, GatedFeedForward
from tameformer.nn.positions import LearnedPositions

Initializer = Callable[[nn.Module], None]


def gpt2_init(model: nn.Module, *, std: float = 0.02) -> None:
    """Normal weights; the last layer of each residual branch divided by sqrt(number of branches).

    So the variance of the stream does not grow with depth at the start (Radford et al. 2019, GPT-2, section 2.3).
    """
    _zero_biases(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | TokenEmbedding | OutputHead):
            nn.init.normal_(module.weight, std=std)
    outputs = _branch_outputs(model)
    for linear in outputs:
        nn.init.normal_(linear.weight, std=std / math.sqrt(len(outputs)))


def vit_init(model: nn.Module) -> None:
    """Xavier uniform linear weights, as in the code released with Dosovitskiy et al. 2020, arXiv:2010.11929.

    A fixed deviation of 0.02, as other releases have it, suits a width of 768 only: at width 64 it makes every branch
    start nearly closed. Convolutions and the stem keep torch's own initialization: their inputs are pixels, not
    normalized features.
    """
    _zero_biases(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("stem."):
            nn.init.xavier_uniform_(module.weight)


def xavier_init(model: nn.Module) -> None:
    """Xavier uniform linear weights, and normal embeddings and learned positions of deviation 1 / sqrt(dim).

    As in the code released with Vaswani et al. 2017, arXiv:1706.03762. The embeddings are meant to be multiplied by
    sqrt(dim) on their way in, and used as they are for the logits.
    """
    _zero_biases(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, TokenEmbedding | OutputHead):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, LearnedPositions):
            nn.init.normal_(module.table, std=module.table.shape[1] ** -0.5)


def _zero_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _branch_outputs(model: nn.Module) -> list[nn.Linear]:
    """The linear layers whose result is added to the residual stream."""
    outputs = []
    for module in model.modules():
        if isinstance(module, MultiHeadAttention | CollaborativeAttention):
            outputs.append(module.out)
        elif isinstance(module, FeedForward | GatedFeedForward):
            outputs.append(module.down)
    return outputs
