"""Spectral norm and stable rank of each weight matrix, by a power iteration that goes on from step to step.

Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957, algorithm 1; stable
rank: Rudelson and Vershynin 2007, arXiv:math/0503442. A power step reads a matrix twice, an exact decomposition costs
hundreds of times as much. Every estimate is at most the true norm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.positions import LearnedPositions
from tameformer.patch import unwrapped
from tameformer.probes.probe import Probe
from tameformer.shapes import Float
from tameformer.tensors import is_ordinary

Where = Callable[[nn.Module, nn.Parameter], bool]
"""Whether a parameter is meant, from the module that owns it and the parameter."""

_BATCH_ENTRIES = 2**24
"""Matrices of one shape are copied together for a batched product up to so many entries."""


def power_step(
    weight: Float[Tensor, "*stack out in_"], right: Float[Tensor, "*stack in_"]
) -> tuple[Float[Tensor, "*stack"], Float[Tensor, "*stack out"], Float[Tensor, "*stack in_"]]:
    """One step of power iteration: sigma, and the next left and right singular vectors, of length 1.

    sigma = |weight^T left| is at most the spectral norm. For weights that are not finite or zero, sigma is NaN or 0 and
    `right` comes back as it was, so that the next step starts from a good vector.

    Example:
        >>> sigma, left, right = power_step(torch.diag(torch.tensor([3.0, 1.0])), torch.tensor([1.0, 0.0]))
        >>> sigma, left, right
        (tensor(3.), tensor([1., 0.]), tensor([1., 0.]))
    """
    left = (weight @ right.unsqueeze(-1)).squeeze(-1)
    length = torch.linalg.vector_norm(left, dim=-1)
    image = (weight.mT @ left.unsqueeze(-1)).squeeze(-1)
    sigma, right = _advance(length, image, right)
    return sigma, left / length.unsqueeze(-1), right


def stable_rank(weight: Float[Tensor, "*stack out in_"], sigma: Float[Tensor, "*stack"]) -> Float[Tensor, "*stack"]:
    """|weight|_F^2 / sigma^2, between 1 and the rank; 0 for a matrix of zeros.

    Example:
        >>> stable_rank(torch.eye(5), torch.tensor(1.0))
        tensor(5.)
    """
    return _rank(weight.square().sum((-2, -1)), sigma)


def is_matrix(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight matrix or the kernel of a convolution; tables of tokens and positions are not."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, TokenEmbedding, LearnedPositions)):
        return False
    if not parameter.is_floating_point() or min(parameter.shape, default=0) < 1:
        return False
    is_kernel = isinstance(module, _ConvNd)
    return (parameter.dim() == 2 or (is_kernel and parameter.dim() > 2)) and 1 < parameter.shape[0] < parameter.numel()


class SpectralNorm(Probe):
    """Spectral norm and stable rank of each matrix as it is before the update; reads each weight once or twice a step.

    Keys are `diag/spectral_norm/<weight>` and `diag/stable_rank/<weight>`: the parameter's name without ".weight", or
    `<module>.in_proj` for the joint projection of `MultiheadAttention`. Kernels count as (first axis, rest); tied
    weights once, under their first name. A weight that changes all at once, by loading a checkpoint say, takes about
    twenty observed steps to be followed.

    A weight that a parametrization computes is measured where that has a method `spectra`, as sigmaReparam's has, which knows
    the norm: each of its parts, under `<weight>[0]` and so on where there are several.

    Args:
        model: Whose parameters.
        where: Which ones; by default all matrices, without embeddings.
        cold_steps: Power steps at the first observed step.
        steps: Power steps at each later one; give more where few steps are observed.
    """

    def __init__(self, model: nn.Module, *, where: Where = is_matrix, cold_steps: int = 50, steps: int = 1) -> None:
        if min(cold_steps, steps) < 1:
            raise ValueError(f"expected at least 1 power step, got cold_steps={cold_steps} and steps={steps}")
        self.cold_steps, self.steps = cold_steps, steps
        self.unseen = self._unseen = {}
        self._slots = weight_slots(model, where, self._unseen)
        self._known = transparent(model)
        for name in self._known:
            self._unseen.pop(name, None)
        self._right: dict[tuple[str, ...], Tensor] = {}  # by the names of matrices that go through products together
        self._values: dict[str, Tensor] = {}

    @torch.no_grad()
    def on_begin(self) -> None:
        """Take the power step."""
        self._values = {}
        for names, weights in self._batches():
            device = weights[0].device
            with torch.autocast(device.type, enabled=False):
                right, steps = self._right.get(names), self.steps
                if right is None or right.device != device:
                    right, steps = _start(len(names), weights[0].shape[1], device), self.cold_steps
                step = _loop_step if device.type == "cpu" else _batch_step
                for _ in range(steps - 1):
                    *_, right = step(weights, right)
                sigma, square, right = step(weights, right)
                self._right[names] = right
                rank = _rank(square, sigma)
            self._values.update(zip((f"diag/spectral_norm/{name}" for name in names), sigma.unbind(), strict=True))
            self._values.update(zip((f"diag/stable_rank/{name}" for name in names), rank.unbind(), strict=True))

        for name, chain in self._known.items():
            if not is_ordinary(chain.original):
                self._unseen[name] = f"a {type(chain.original).__name__}, of which this process may hold a part only"
                continue
            norms, squares = cast(Any, chain[0]).spectra()
            labels = part_labels(name, len(norms))
            ranks = _rank(squares, norms)
            self._values.update(zip((f"diag/spectral_norm/{label}" for label in labels), norms.unbind(), strict=True))
            self._values.update(zip((f"diag/stable_rank/{label}" for label in labels), ranks.unbind(), strict=True))

    def read(self) -> Mapping[str, Tensor]:
        """One value a matrix: its spectral norm and its stable rank."""
        return dict(self._values)

    def _batches(self) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
        """Names and matrices of one shape, on one device, few enough to be copied together."""
        alike: dict[tuple[torch.Size, torch.device], list[tuple[str, Tensor]]] = {}
        for name, parameter in present(self._slots, self._unseen):
            weight = parameter.detach().flatten(1)
            alike.setdefault((weight.shape, weight.device), []).append((name, weight))
        for (shape, _), members in alike.items():
            size = max(1, _BATCH_ENTRIES // shape.numel())
            for start in range(0, len(members), size):
                names, weights = zip(*members[start : start + size], strict=True)
                yield names, list(weights)


def weight_slots(model: nn.Module, where: Where, unseen: dict[str, str]) -> dict[str, tuple[nn.Module, str]]:
    """Where the chosen parameters sit, (module, attribute) by label; the rest of the matrices goes to `unseen`."""
    slots: dict[str, tuple[nn.Module, str]] = {}
    taken: set[int] = set()
    for name, module in unwrapped(model).named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or id(parameter) in taken:
                continue
            taken.add(id(parameter))
            full = f"{name}.{attribute}" if name else attribute
            if isinstance(module, ParametrizationList):
                if parameter.dim() > 1:
                    unseen[name.replace("parametrizations.", "")] = "computed by a parametrization on every access"
            elif where(module, parameter):
                slots[weight_label(full)] = (module, attribute)
            elif not isinstance(module, _ConvNd) and sum(length > 1 for length in parameter.shape) > 2:
                unseen[full] = f"{parameter.dim()} axes {tuple(parameter.shape)}: not one matrix"
    return slots


def transparent(model: nn.Module) -> dict[str, ParametrizationList]:
    """By the name of the weight, lone parametrizations that say what they make of it, as sigmaReparam's does; each once."""
    found: dict[str, ParametrizationList] = {}
    taken: set[nn.Module] = set()
    for name, module in unwrapped(model).named_modules():
        if isinstance(module, ParametrizationList) and len(module) == 1 and module[0] not in taken:
            taken.add(module[0])
            if hasattr(module[0], "spectra"):
                found[name.replace("parametrizations.", "")] = module
    return found


def part_labels(name: str, parts: int) -> list[str]:
    """A label for each part of a weight.

    Example:
        >>> part_labels("attn.qkv.weight", 3), part_labels("attn.out.weight", 1)
        (['attn.qkv[0]', 'attn.qkv[1]', 'attn.qkv[2]'], ['attn.out'])
    """
    label = weight_label(name)
    return [label] if parts == 1 else [f"{label}[{part}]" for part in range(parts)]


def weight_label(name: str) -> str:
    """A parameter's name without what all weights share.

    Example:
        >>> weight_label("layers.0.linear1.weight"), weight_label("self_attn.in_proj_weight"), weight_label("weight")
        ('layers.0.linear1', 'self_attn.in_proj', 'weight')
    """
    return name.removesuffix("weight").rstrip("._") or name


def present(slots: Mapping[str, tuple[nn.Module, str]], unseen: dict[str, str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters as they are now, by label; what is no ordinary tensor goes to `unseen`."""
    for name, (module, attribute) in slots.items():
        parameter = module._parameters.get(attribute)
        if parameter is None:
            unseen[name] = "no longer a parameter of its module"
        elif not is_ordinary(parameter):
            unseen[name] = f"a {type(parameter).__name__}, of which this process may hold a part only"
        elif parameter.is_meta or parameter.dim() < 2:
            unseen[name] = f"not here as a matrix: {tuple(parameter.shape)} on {parameter.device}"
        else:
            yield name, parameter


def _loop_step(weights: Sequence[Tensor], right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmas, squared Frobenius norms and next vectors; one matrix after the other stays in the processor's cache."""
    lefts, images, squares = [], [], []
    for weight, vector in zip(weights, right.unbind(), strict=True):
        weight = weight.float()
        left = torch.mv(weight, vector)
        lefts.append(left)
        images.append(torch.mv(weight.t(), left))
        flat = weight.reshape(-1)
        squares.append(torch.dot(flat, flat))
    length = torch.linalg.vector_norm(torch.stack(lefts), dim=-1)
    sigma, right = _advance(length, torch.stack(images), right)
    return sigma, torch.stack(squares), right


def _batch_step(weights: Sequence[Tensor], right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with few calls, for devices where a call costs more than a copy."""
    stack = torch.stack(list(weights)).float() if len(weights) > 1 else weights[0].unsqueeze(0).float()
    sigma, _, right = power_step(stack, right)
    return sigma, torch.linalg.vector_norm(stack, dim=(-2, -1)).square(), right


def _advance(length: Tensor, image: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Sigma and the next right vectors from |W right| and W^T W right; bad images leave the vectors as they were."""
    norm = torch.linalg.vector_norm(image, dim=-1)
    sigma = torch.where(length == 0, length, norm / length)
    usable = (norm.isfinite() & (norm > 0)).unsqueeze(-1)
    return sigma, torch.where(usable, image / norm.unsqueeze(-1), right)


def _rank(square: Tensor, sigma: Tensor) -> Tensor:
    return torch.where(sigma == 0, sigma, square / sigma.square())


def _start(count: int, width: int, device: torch.device) -> Tensor:
    """Vectors of length 1 in general position, always the same, without the global generator."""
    right = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(right, dim=-1).to(device)
