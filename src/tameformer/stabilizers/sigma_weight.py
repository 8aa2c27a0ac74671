"""The weight with a learned spectral norm, as a parametrization, and how its singular vectors follow the optimizer.

Forward only reads. One hook on torch's optimizers takes the power step for the weights that an optimizer has just stepped, so
that gradient accumulation, checkpointing and several forward passes all see the same function, evaluation sees that function
too, and a compiled forward has nothing to change. (A weight's version counter alone would not do: fused optimizers do not
move it.) A loop that updates weights without a torch optimizer is noticed by that counter, in its next training forward;
`advance` is for what neither sees.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList

from tameformer.errors import PatchError
from tameformer.optim.followed import Followed
from tameformer.shapes import Float
from tameformer.stabilizers.power_iteration import image_and_sigma, leading_right, power_steps
from tameformer.stabilizers.weight_parts import Parts
from tameformer.tensors import gathered

StepsAt = Callable[[int], int]
"""From the number of optimizer steps so far to the power steps to take after the next one."""

Start = Callable[[int, int], float]
"""From the numbers of rows and columns of a matrix to where its gamma starts."""


def constant(gamma: float, rows: int, columns: int) -> float:
    """The same gamma for every matrix."""
    return gamma


def by_shape(gain: float, rows: int, columns: int) -> float:
    """Start at gain * sqrt(rows / columns), for which the RMS of outputs does not depend on the shape of the matrix.

    Yang, Simon and Bernstein 2023, "A Spectral Condition for Feature Learning", arXiv:2310.17813, condition 1. A large Gaussian
    matrix with as many rows as columns has the spectral norm 2 where it keeps the RMS of its inputs.

    Example:
        >>> by_shape(2.0, 64, 4)
        8.0
    """
    return gain * (rows / columns) ** 0.5


def effective_weight(
    weight: Float[Tensor, "out in_"], gamma: Float[Tensor, ""], right: Float[Tensor, " in_"]
) -> Float[Tensor, "out in_"]:
    """Weight times gamma / sigma, with sigma = |weight right| for a fixed unit vector `right`; differentiable in the others.

    With the exact right singular vector this has the spectral norm |gamma|, the gradient of `weight` is orthogonal to `weight`,
    and scaling `weight` changes nothing (equation 4).

    Example:
        >>> effective_weight(torch.eye(2) * 5, torch.tensor(2.0), torch.tensor([1.0, 0.0]))
        tensor([[2., 0.],
                [0., 2.]])
    """
    _, sigma = image_and_sigma(weight, right)
    return weight * (gamma / sigma)


@dataclass(slots=True)
class _Now:
    """What a weight knows in this process only; apart, since a module is slow to set attributes on."""

    is_ready: bool  # values have been given, if it came from the meta device
    owner: ParametrizationList | None = None
    images: list[Tensor] | None = None  # W right of the last training forward: half of the next power step
    count: int | None = 0  # of updates
    seen_version: int | None = None  # of the weight when the vectors last advanced, in a loop without an optimizer
    has_optimizer: bool = False
    right_version: int | None = None  # of the singular vectors when their length was known to be 1


class SigmaReparam(nn.Module):
    """The parametrization of one stored weight: turns it into its effective weight on every access.

    Reads its state and changes none of it that counts, so that it may be called any number of times between two updates.

    Args:
        weight: The stored weight, whose values it starts from.
        parts: The matrices in it, each with its own gamma.
        start: Where gamma starts; None is at sigma, where the effective weight is bit for bit the weight.
        steps_at: Power steps after each update.
        name: In messages.
    """

    decayed_parameters = (
        "gamma",
    )  # the spectral norm is what weight decay can regularize, the length of W is without effect
    gamma: nn.Parameter
    right: Tensor
    updates: Tensor

    def __init__(
        self, weight: nn.Parameter, parts: Parts, *, start: Start | None, steps_at: StepsAt, name: str = "weight"
    ) -> None:
        super().__init__()
        self.parts, self.start, self.steps_at, self.name = parts, start, steps_at, name
        # In fp32 also beside half precision: a rounded gamma would not start where the function is, and would not move.
        new = partial(torch.empty, dtype=_wide(weight), device=weight.device)
        self.gamma = nn.Parameter(new(len(parts.sizes)), requires_grad=weight.requires_grad)
        self.register_buffer("right", new(len(parts.sizes), parts.columns))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64, device=weight.device))
        self._now = _Now(is_ready=not weight.is_meta)
        self._now.has_optimizer = False
        self._now.is_ready = not weight.is_meta
        if self._now.is_ready:
            self._reset(weight)

    @property
    def weight(self) -> nn.Parameter:
        """The stored weight; after an optimizer's step this is what it stepped."""
        assert self._now.owner is not None, "it was registered"
        return self._now.owner.original  # pyright: ignore[reportReturnType]

    def followed(self) -> Tensor | None:
        """The stored weight, once it has values."""
        return self.weight if self._now.owner is not None and self._now.is_ready else None

    def attach(self, owner: ParametrizationList) -> None:
        """Follow the stored weight in `owner`, where it is once this is registered."""
        self._now.owner = owner
        FOLLOWED.add(self)

    @torch.no_grad()
    def effective(self) -> Tensor:
        """The effective weight as forward and evaluation have it now."""
        with _full_precision(self.right.device):
            return _EffectiveWeight.apply(self.weight, self.gamma, self.right, self)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def spectra(self) -> tuple[Tensor, Tensor]:
        """Spectral norm and squared Frobenius norm of each part of the effective weight, (parts,) both.

        The spectral norm is |gamma|, as near as the singular vectors follow the weight: no power step is needed for it.
        """
        with _full_precision(self.right.device):
            matrices, factors = self.scaled_parts()
            squares = torch.stack([dot(one, one) for one in matrices])
            return self.gamma.abs(), squares * factors.square()

    @torch.no_grad()
    def scaled_parts(self) -> tuple[list[Tensor], Tensor]:
        """The parts of the stored weight, and by what each is multiplied in the effective weight, (parts,)."""
        with _full_precision(self.right.device):
            matrices = self._matrices(self.weight.detach())
            sigmas = [image_and_sigma(*one)[1] for one in zip(matrices, self.right, strict=True)]
            return matrices, self.gamma / torch.stack(sigmas)

    def reset_parameters(self) -> None:
        """Start over from the stored weight as it is now: after values were given to a model built on the meta device."""
        self._reset(self.weight)
        self._now.is_ready = True

    @torch.no_grad()
    def _reset(self, weight: Tensor) -> None:
        rights, sigmas = [], []
        for matrix in self._matrices(weight.detach()):
            if not matrix.isfinite().all():
                raise PatchError(
                    f"{self.name} holds NaN or infinity and has no spectral norm; load sound weights first"
                )
            if not matrix.any():
                raise PatchError(
                    f"{self.name} is zero and has no direction to scale; initialize it, or leave it out: where="
                )
            rights.append(leading_right(matrix))
            sigmas.append(image_and_sigma(matrix, rights[-1])[1])
        self.right.copy_(torch.stack(rights))
        if self.start is None:
            self.gamma.copy_(torch.stack(sigmas))
        else:
            shapes = [matrix.shape for matrix in self._matrices(weight.detach())]
            self.gamma.copy_(torch.tensor([self.start(*shape) for shape in shapes], dtype=self.gamma.dtype))
        self.updates.zero_()
        self._now.images, self._now.seen_version, self._now.count = None, None, 0

    def forward(self, weight: Tensor) -> Tensor:
        """The effective weight, of the stored one's shape and dtype."""
        if not self._now.is_ready:
            raise PatchError(
                f"{self.name} came from the meta device and its gamma and singular vectors have no values yet: load a "
                f"checkpoint of the patched model, or give the weight values and call reset_parameters() of this SigmaReparam"
            )
        with _full_precision(weight.device):
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                gammas = self.gamma.to(self.right.dtype)
                parts = zip(self._matrices(weight), gammas.unbind(), self.right.unbind(), strict=True)
                return self.parts.join([effective_weight(*one) for one in parts]).to(weight.dtype)
            if not self.training:
                self._start_over_if_averaged()
            elif not self._now.has_optimizer:
                self._advance_if_changed(weight)
            return _EffectiveWeight.apply(weight, self.gamma, self.right, self)  # pyright: ignore[reportReturnType]

    def _matrices(self, weight: Tensor) -> list[Tensor]:
        return [part.to(_wide(weight)) for part in self.parts.of(weight)]

    def _updates_so_far(self) -> int:
        if self._now.count is None:
            self._now.count = int(self.updates)  # once after loading: on an accelerator this waits for it
        return self._now.count

    def _advance_if_changed(self, weight: Tensor) -> None:
        if weight is not self.weight or weight.is_inference():
            return  # a stand-in of this one call
        if self._now.seen_version is not None and self._now.seen_version != weight._version:
            _advance([self])
        self._now.seen_version = weight._version

    @torch.no_grad()
    def _start_over_if_averaged(self) -> None:
        """Find the singular vectors anew where an average of models has made shorter ones of them.

        Shorter vectors give a smaller sigma, and the effective weight would be longer than gamma.
        """
        if self.right.is_inference() or self.right._version == self._now.right_version:
            return
        lengths = torch.linalg.vector_norm(self.right, dim=-1)
        if bool(((lengths - 1).abs() > 1e-3).any()):
            self.right.copy_(
                torch.stack([leading_right(one) for one in self._matrices(gathered(self.weight.detach()))])
            )
        self._now.right_version = self.right._version

    def _apply(self, fn, recurse=True):
        """Moves to other devices, and to other dtypes unless they are narrower than fp32."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if self._now.is_ready and tensor.is_meta and not moved.is_meta:
                self._now.is_ready = False
            is_narrower = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device) if is_narrower else moved

        self._now.images = self._now.seen_version = None
        super()._apply(kept, recurse)
        if self.right.is_meta:
            self._now.is_ready = False
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._now.images = self._now.seen_version = self._now.count = None
        if f"{prefix}gamma" in state_dict and f"{prefix}right" in state_dict:
            self._now.is_ready = not self.right.is_meta

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        FOLLOWED.add(self)  # a copy is followed, too

    def extra_repr(self) -> str:
        """The parts."""
        return f"rows={self.parts.sizes}"


class _EffectiveWeight(torch.autograd.Function):
    """`effective_weight` of every part with half the passes over memory that its automatic gradient would take.

    With G the gradient of the effective weight, v = right and u = weight v / sigma:
    dgamma = <G, weight> / sigma and dweight = gamma / sigma (G - <G, weight> / sigma u vᵀ).
    """

    @staticmethod
    def forward(ctx, weight: Tensor, gamma: Tensor, right: Tensor, module: SigmaReparam) -> Tensor:
        parts = module.parts
        matrices = module._matrices(weight)
        images, lengths = zip(*map(image_and_sigma, matrices, right), strict=True)
        if module.training:
            module._now.images = list(images)
        ctx.parts, ctx.sigmas, ctx.gammas = parts, numbers(lengths), numbers(gamma)
        # A copy: the buffer is written between two forward passes by DistributedDataParallel.
        ctx.save_for_backward(weight, right.clone(), *images)
        try:
            factors = list(map(truediv, ctx.gammas, ctx.sigmas))
        except ZeroDivisionError:
            raise PatchError(
                f"{module.name} has become zero and has no direction to scale; give it other values"
            ) from None
        return parts.filled(weight, [partial(torch.mul, *one) for one in zip(matrices, factors, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, right, *images = ctx.saved_tensors
        parts: Parts = ctx.parts
        with _full_precision(weight.device):
            grad = grad.to_dense() if grad.is_sparse else grad
            grads, matrices = ([part.to(right.dtype) for part in parts.of(one)] for one in (grad, weight))
            products = numbers([dot(*both) for both in zip(grads, matrices, strict=True)])
            gamma_grads = list(map(truediv, products, ctx.sigmas))
            gamma_grad = stacked(gamma_grads, like=right)
            if not ctx.needs_input_grad[0]:
                return None, gamma_grad, None, None
            writes = [
                partial(without_share, one, gamma / sigma, -gamma / sigma * share / sigma, image, vector)
                for one, gamma, sigma, share, image, vector in zip(
                    grads, ctx.gammas, ctx.sigmas, gamma_grads, images, right, strict=True
                )
            ]
            return parts.filled(weight, writes), gamma_grad, None, None


def number(scalar: Tensor) -> Any:
    """A plain number where reading one costs nothing; on an accelerator it would wait for all work before it."""
    return scalar.item() if scalar.is_cpu else scalar


def numbers(scalars: Sequence[Tensor] | Tensor) -> Sequence[Any]:
    """Those of several, or the entries of a vector."""
    if isinstance(scalars, Tensor):
        return scalars.tolist() if scalars.is_cpu else scalars.unbind()
    return [number(scalar) for scalar in scalars]


def stacked(scalars: Sequence[Any], *, like: Tensor) -> Tensor:
    """`numbers` the other way round."""
    if isinstance(scalars[0], float):
        return torch.tensor(scalars, dtype=like.dtype)
    return torch.stack(list(scalars))


def dot(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the products of the entries."""
    return torch.dot(one.reshape(-1), other.reshape(-1))


def without_share(grad: Tensor, factor: Any, share: Any, image: Tensor, right: Tensor, out: Tensor | None = None):
    """Factor * grad + share * image rightᵀ; in one pass where the two factors are plain numbers."""
    if isinstance(factor, float) and (out is None or out.dtype == grad.dtype):
        return torch.addr(grad, image, right, beta=factor, alpha=share, out=out)
    if out is None or out.dtype == grad.dtype:
        return torch.mul(grad, factor, out=out).addr_(image * share, right)
    return out.copy_((grad * factor).addr_(image * share, right))


def _wide(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


@torch.no_grad()
def _advance(due: Iterable[SigmaReparam]) -> None:
    """The power steps of these weights after an update, those that take the same number together."""
    by_steps: dict[int, list[SigmaReparam]] = {}
    for one in due:
        by_steps.setdefault(one.steps_at(one._updates_so_far()), []).append(one)
    for steps, members in by_steps.items():
        matrices, rights, images = [], [], []
        with _full_precision(members[0].right.device):
            for one in members:
                of_one = one._matrices(gathered(one.weight.detach()))
                matrices += of_one
                rights += one.right.unbind()
                images += one._now.images or [None] * len(of_one)
            power_steps(matrices, rights, images, steps=steps)
        for one in members:
            one._now.images, one._now.count = None, one._updates_so_far() + 1
            one.updates.add_(1)


def _after_step(due: list[SigmaReparam]) -> None:
    for one in due:
        one._now.has_optimizer = True
    _advance(due)


FOLLOWED = Followed(_after_step)


def advance(model: nn.Module) -> None:
    """Take the power steps that follow an update, in a loop whose updates nobody sees.

    Optimizers of torch are seen, and so are updates in place of the weights of a model that is not compiled: for those there
    is nothing to call. An update through `.data` in a loop without an optimizer, or of a compiled model without one, needs
    this after it.
    """
    _advance([module for module in model.modules() if isinstance(module, SigmaReparam)])
