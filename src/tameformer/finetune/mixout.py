"""Weights that are the pretrained ones now and then (Lee et al. 2020, "Mixout", arXiv:1909.11299).

In each training pass a random part p of the weights W is replaced by the pretrained W0, and the rest corrected so that the
mean is W (equation 7; M is 1 with probability 1 - p):

    effective weight = W0 + M (W - W0) / (1 - p)

so that its gradient with respect to W is M / (1 - p). Meant in place of dropout, with p from 0.1 to 0.9.

Differs from the published code: that gradient is right there, where the published one lacks 1 / (1 - p) and is a tenth of it at
p = 0.9; W0 is saved and moved with the model; each weight has its own M unless `per_neuron` is asked for, which is what the
published code does; layers without a pretrained weight, such as a new head, are left alone.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.errors import PatchError
from tameformer.finetune.prior_decay import SUFFIX
from tameformer.patch import PatchHandle, Selector, blocks, select
from tameformer.patch.parametrized import chain_of, parametrize, unparametrize
from tameformer.shapes import Float
from tameformer.stabilizers.weight_parts import is_transposed, weight_names
from tameformer.tensors import is_sharded

Draw = Callable[[tuple[int, ...], bool], tuple[int, ...]]
"""From a weight's shape, and whether it is stored (in, out), to the shape of M, which is spread over the weight."""


def per_weight(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Each weight is drawn for itself."""
    return shape


def per_neuron(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """All weights that leave an input neuron are replaced together, as dropout drops them.

    Example:
        >>> per_neuron((8, 4), False), per_neuron((4, 8), True)
        ((1, 4), (4, 1))
    """
    return (shape[0], 1) if transposed else (1, *shape[1:])


def mixed(
    weight: Float[Tensor, "*shape"], target: Float[Tensor, "*shape"], p: float, drawn: tuple[int, ...]
) -> Float[Tensor, "*shape"]:
    """W0 + M (W - W0) / (1 - p), with M of shape `drawn` from torch's global generator of the weight's device.

    Example:
        >>> weight = torch.ones(1000)
        >>> sorted(set(mixed(weight, torch.zeros(1000), 0.75, (1000,)).tolist()))
        [0.0, 4.0]
    """
    scale = F.dropout(weight.new_ones(drawn), p)  # M / (1 - p), and constant for autograd
    return torch.addcmul(target, scale, weight - target)


class Mixout(nn.Module):
    """The parametrization of one weight; in evaluation mode it is the weight itself."""

    target: Tensor

    def __init__(self, weight: Tensor, p: float, drawn: tuple[int, ...]):
        super().__init__()
        self.p, self.drawn = p, drawn
        self.register_buffer("target", weight.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight."""
        if not self.training or self.p == 0:
            return weight
        return mixed(weight, self.target, self.p, self.drawn)

    def extra_repr(self) -> str:
        """Settings shown when the module is printed."""
        return f"p={self.p}, drawn={self.drawn}"


def mixout(model: nn.Module, p: float = 0.9, *, draw: Draw = per_weight, where: Selector | None = None) -> PatchHandle:
    """Replace a random part of the weights by what they are now, anew in each training pass; evaluation is unchanged.

    Call it once the pretrained weights are loaded, before the optimizer is built. The present weights become buffers beside
    the weights: they go into checkpoints, follow `.to` and are copied, and cost as much memory again. What is drawn comes from
    torch's global generator, as dropout's does: a step that is seeded is repeated exactly, processes draw for themselves, and
    a recomputation for gradient checkpointing draws the same again. Biases and norms are left alone. Removing and baking are
    the same: the weights stay as they were trained.

    Args:
        model: Any model, not yet wrapped or sharded.
        p: Probability that a weight is replaced, at least 0 and below 1.
        draw: What is replaced together: `per_weight` or `per_neuron`.
        where: The layers; None takes all linear layers inside the repeated ones, so that a new head is not held to its random
            start.

    Raises:
        ValueError: `p` is out of range.
        PatchError: Nothing matches; a weight is tied, patched already, sharded, or no plain parameter.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
        >>> handle = mixout(model, 0.5)
        >>> handle.names[:2]
        ('layers.0.self_attn.in_proj_weight', 'layers.0.self_attn.out_proj.weight')
        >>> handle.remove()
    """
    if not 0 <= p < 1:
        raise ValueError(f"expected p from 0 to below 1, got {p}; at 1 nothing would be left to learn")
    inside = tuple(f"{name}." for name in blocks(model))

    def in_layers(name: str, module: nn.Module) -> bool:
        return bool(weight_names(module)) and name.startswith(inside)

    layers = select(model, where or in_layers, looked_for="linear layers inside repeated layers")
    counts: dict[int, int] = {}
    for _, one in model.named_parameters(remove_duplicate=False):
        counts[id(one)] = counts.get(id(one), 0) + 1
    names = []
    with ExitStack() as undo:
        for path, module in layers.items():
            for name in weight_names(module):
                full = f"{path}.{name}".lstrip(".")
                weight = module._parameters.get(name)
                _check(full, module, name, weight, counts)
                assert weight is not None, "checked"
                shape = draw(tuple(weight.shape), is_transposed(module))
                one = Mixout(weight, p, shape).train(module.training)
                parametrize(module, name, one)
                undo.callback(unparametrize, module, name, one)
                names.append(full)
        if not names:
            raise PatchError(f"none of {', '.join(layers)} has a weight that acts as a matrix; mend where=")
        kept = undo.pop_all()
    return PatchHandle("mixout", names, kept, bake=kept.close, settings={"p": p})


def _check(full: str, module: nn.Module, name: str, weight: nn.Parameter | None, counts: dict[int, int]) -> None:
    if chain_of(module, name) is not None:
        raise PatchError(f"{full} is patched already; remove that patch, or leave the layer out with where=")
    if weight is None or not weight.is_floating_point():
        raise PatchError(f"{full} is no parameter that learns; leave the layer out with where=")
    if is_sharded(weight):
        raise PatchError(f"{full} is sharded over processes; patch the model first, then shard it")
    if counts[id(weight)] > 1:
        raise PatchError(f"{full} is tied to another weight, which would then be another; untie it, or leave it out")


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without what `mixout` and `prior_decay` keep in it: the weights as they were trained, by their plain names.

    Example:
        >>> layer = nn.Linear(2, 2, bias=False)
        >>> handle = mixout(layer, where=lambda name, module: True)
        >>> list(layer.state_dict()), list(plain_tensors(layer.state_dict()))
        (['parametrizations.weight.original', 'parametrizations.weight.0.target'], ['weight'])
    """
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in tensors:
            continue
        if re.search(r"parametrizations\.\w+\.0\.target$", name):
            continue
        if f"{name.removesuffix('original')}0.target" in tensors:
            name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
        found[name] = tensor
    return found
