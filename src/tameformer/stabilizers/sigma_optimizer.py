"""sigmaReparam beside the optimizer: plain layers hold the effective weight, their stored weight and gamma live here.

The same method as `sigma_reparam`, at its lowest cost: nothing is computed in forward or backward, all work is done once per
optimizer step. In exchange the loop must keep to three things, which is why it is not the default:

- the optimizer is built over `groups`, so that it steps the stored weights, and given to `follow`;
- gradients are cleared by `model.zero_grad()` where a step is left out (the optimizer does not know the layers' weights);
- a gradient scaler has no gradients to look at: train in fp32 or bf16. Clipping sees the gradients of the effective weights.

All gammas are one parameter, since an optimizer takes as long for one number as for hundreds. Those of weights without a
gradient in a step are put back after it.

A checkpoint holds `state_dict()` beside those of model and optimizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.errors import PatchError
from tameformer.patch import Selector, select
from tameformer.stabilizers.power_iteration import power_step, power_steps
from tameformer.stabilizers.sigma_reparam import is_matrix_layer, more_at_first, plain_weights, start_at
from tameformer.stabilizers.sigma_weight import (
    SigmaReparam,
    StepsAt,
    dot,
    number,
    numbers,
    stacked,
    without_share,
)
from tameformer.stabilizers.weight_parts import Parts, Split, is_transposed, split_fused, weight_names


class SigmaBesideOptimizer:
    """The stored weights and gammas of a model whose layers hold the effective weights.

    Args:
        model: Not sharded. Its weights stay the parameters they are; a tied one counts once.
        where: As in `sigma_reparam`, and so are the others.
        gamma: Where gamma starts; None is at sigma.
        gain: As in `sigma_reparam`.
        split: The parts of fused projections.
        steps_at: Power steps after each update.
        dtype: Of the layers' weights; None leaves them as they are. With `torch.bfloat16`, the layers hold what autocast would
            round their weights to: a model that runs under autocast to it, and only there, computes the same numbers, and is
            spared the rounding. Gradients are then added up over micro-batches in that precision. Stored weights stay in fp32,
            and so do weights that other layers share, such as embeddings, which autocast does not round.

    Raises:
        PatchError: As `sigma_reparam` does; or the model is on several devices.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> beside = SigmaBesideOptimizer(model)
        >>> optimizer = torch.optim.AdamW(beside.groups([{"params": [*model.parameters()]}]))
        >>> beside.follow(optimizer)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()  # updates the stored weight and gamma, and then model.weight from them
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        where: Selector = is_matrix_layer,
        gamma: float | None = None,
        gain: float | None = None,
        split: Split = split_fused,
        steps_at: StepsAt = more_at_first,
        dtype: torch.dtype | None = None,
    ) -> None:
        layers = select(model, where, looked_for="linear layers, convolutions, attention projections")
        parents = {id(child): parent for parent in model.modules() for child in parent.children()}
        self.steps_at, self.updates = steps_at, 0
        self._weights: dict[str, _Weight] = {}
        gammas: list[Tensor] = []
        for end, weight in plain_weights(layers):
            if any(weight is other.effective for other in self._weights.values()):
                continue
            rows = split(end.path, end.module, parents.get(id(end.module)))
            parts = Parts(weight.shape, transposed=is_transposed(end.module), rows=rows)
            # For its state at the start; it is never called.
            start = SigmaReparam(weight, parts, start=start_at(gamma, gain), steps_at=steps_at, name=end.full)
            self._weights[end.full] = _Weight(weight, parts, start.right)
            gammas.append(start.gamma.detach())
        if len({gamma.device for gamma in gammas}) > 1:
            raise PatchError("expected a model on one device, got one over several; use sigma_reparam")
        self._counts = [len(gamma) for gamma in gammas]
        self.gammas = nn.Parameter(torch.cat(gammas))
        self._resting: list[tuple[Tensor, Tensor]] = []
        if dtype is not None:
            kept = {
                id(one)
                for other in model.modules()
                if not weight_names(other)
                for one in other.parameters(recurse=False)
            }
            for weight in self._weights.values():
                if id(weight.effective) not in kept:
                    weight.effective.data = weight.effective.detach().to(dtype)
        self._write()

    @property
    def names(self) -> list[str]:
        """Of the weights, as in the model."""
        return list(self._weights)

    def groups(
        self, groups: Iterable[Mapping[str, Any]], *, gamma_settings: Mapping[str, Any] | None = None
    ) -> list[dict]:
        """The optimizer's groups with each effective weight replaced by its stored one, and one more group for the gammas.

        Weight decay is taken off the stored weights, whose length is without effect: they get a group of their own for each
        group they were in.

        Args:
            groups: Over the model's parameters, as for the optimizer.
            gamma_settings: Of the gammas' group, such as `{"weight_decay": 0.1}`.
        """
        stored = {id(weight.effective): weight.stored for weight in self._weights.values()}
        found: list[dict] = []
        for group in groups:
            parameters = list(group["params"])
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            plain = [parameter for parameter in parameters if id(parameter) not in stored]
            mine = [stored[id(parameter)] for parameter in parameters if id(parameter) in stored]
            if plain:
                found.append({**settings, "params": plain})
            if mine:
                found.append({**settings, "params": mine, "weight_decay": 0.0})
        return [*found, {**(gamma_settings or {}), "params": [self.gammas]}]

    def follow(self, optimizer: Optimizer) -> None:
        """Give the optimizer its gradients before each step, and the layers their weights after it.

        Raises:
            ValueError: It was not built over `groups`, so that weights would stand still. A step with a closure raises it, too,
                since its gradients would come too late.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self._weights.items():
            is_missed = weight.stored.requires_grad and id(weight.stored) not in held
            if is_missed or id(weight.effective) in held:
                raise ValueError(
                    f"expected an optimizer over the stored weight of {name}, got one "
                    f"{'without it' if is_missed else 'over the weight itself'}; build it over groups(...) of this object"
                )
        optimizer.register_step_pre_hook(lambda _, given, named: self._take_gradients(given, named))
        optimizer.register_step_post_hook(lambda *_: self._advance())

    def state_dict(self) -> dict[str, Tensor]:
        """Stored weights, gammas and singular vectors, by the names of the weights."""
        state = {"updates": torch.tensor(self.updates)}
        for (name, weight), gamma in zip(self._weights.items(), self._gammas(), strict=True):
            of_weight = {"stored": weight.stored.detach(), "gamma": gamma, "right": weight.right}
            state |= {f"{name}.{key}": tensor for key, tensor in of_weight.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, and write the layers' weights from it.

        Raises:
            KeyError: A weight is not in it; nothing has changed then.
        """
        mine = self.state_dict()
        missing = [name for name in mine if name not in state]
        if missing:
            raise KeyError(
                f"expected the state of the same weights, got one without {missing[0]} and {len(missing) - 1} more; "
                f"load what state_dict() gave for this model"
            )
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        self.updates = int(state["updates"])
        self._write()

    def _gammas(self) -> tuple[Tensor, ...]:
        """Of each weight, in the memory of the parameter."""
        return self.gammas.detach().split(self._counts)

    @torch.no_grad()
    def _take_gradients(self, given: Sequence[Any], named: Mapping[str, Any]) -> None:
        if any(one is not None for one in [*given[1:], named.get("closure")]):
            raise ValueError(
                "expected step() after backward(), got step(closure); call the closure first, or use sigma_reparam"
            )
        found, self._resting = [], []
        for weight, gamma in zip(self._weights.values(), self._gammas(), strict=True):
            if weight.effective.grad is None:
                self._resting.append((gamma, gamma.clone()))
                found += numbers(torch.zeros_like(gamma))
                weight.stored.grad = None
            else:
                found += weight.take_gradient(weight.effective.grad)
        self.gammas.grad = stacked(found, like=self.gammas) if len(self._resting) < len(self._weights) else None

    @torch.no_grad()
    def _advance(self) -> None:
        for gamma, before in self._resting:
            gamma.copy_(before)
        self._write(steps=self.steps_at(self.updates))
        self.updates += 1

    @torch.no_grad()
    def _write(self, *, steps: int = 0) -> None:
        """The layers' weights from the stored ones, after so many power steps."""
        # The last first: the optimizer has just come by there, and the next forward pass begins at the other end.
        weights = [*reversed(self._weights.values())]
        matrices = [one for weight in weights for one in reversed(weight.matrices())]
        if not matrices[0].right.is_cpu:
            rights, images = [one.right for one in matrices], [one.image for one in matrices]
            power_steps([one.stored for one in matrices], rights, images, steps=steps)
            steps = 0
        # On a processor one after the other: what its power step has read is in the cache when the layer's matrix is written.
        for one, gamma in zip(matrices, reversed(numbers(self.gammas.detach())), strict=True):
            one.write(gamma, steps)
        for weight in weights:
            weight.finish()


@dataclass(slots=True)
class _Matrix:
    """One matrix of a weight, and what its next gradient and its next power step need.

    Kept from step to step, and lean: the weights leave no room in the cache for code and objects, so that every view, call and
    check is felt.
    """

    stored: Tensor
    target: Tensor  # in the layer's weight, where it can be written in place
    right: Tensor
    image: Tensor  # stored right
    sigma: Any = None
    factor: Any = None  # gamma / sigma

    def take_gradient(self, grad: Tensor) -> Any:
        """Make the gradient of the effective matrix that of the stored one; returns that of gamma."""
        factor, sigma = self.factor, self.sigma
        share = number(dot(grad, self.stored)) / sigma
        without_share(grad, factor, -factor * share / sigma, self.image, self.right, out=grad)
        return share

    def write(self, gamma: Any, steps: int) -> None:
        """The effective matrix, after so many power steps."""
        stored, right, image = self.stored, self.right, self.image
        for step in range(steps):
            if step:
                torch.mv(stored, right, out=image)
            power_step(stored, right, image)
        torch.mv(stored, right, out=image)
        self.sigma = sigma = number(torch.linalg.vector_norm(image))
        self.factor = factor = gamma / sigma
        torch.mul(stored, factor, out=self.target)


class _Weight:
    """One weight of the model and what stands behind it.

    Args:
        effective: The layer's parameter.
        parts: The matrices in it.
        right: Their right singular vectors.
    """

    def __init__(self, effective: nn.Parameter, parts: Parts, right: Tensor) -> None:
        wide = effective.detach().to(right.dtype, copy=True, memory_format=torch.contiguous_format)
        self.effective, self.stored = effective, nn.Parameter(wide, requires_grad=effective.requires_grad)
        self.parts, self.right = parts, right
        images = [right.new_empty(size) for size in parts.sizes]
        self._matrices = [_Matrix(right, right, *both) for both in zip(right, images, strict=True)]
        self._seen: tuple[int, int] | None = None

    def matrices(self) -> list[_Matrix]:
        """In the memory that the two weights have now: whoever assigns to `.data` gives them another."""
        places = self.stored.data_ptr(), self.effective.data_ptr()
        if places != self._seen or self.parts.groups > 1:
            effective, found = self.effective.detach(), self.parts.of(self.stored.detach())
            targets = self.parts.of(effective) if self._is_in_place else [torch.empty_like(one) for one in found]
            for one, stored, target in zip(self._matrices, found, targets, strict=True):
                one.stored, one.target = stored, target
            self._seen = places
        return self._matrices

    @property
    def _is_in_place(self) -> bool:
        return self.parts.groups == 1 and self.effective.is_contiguous()

    def take_gradient(self, grad: Tensor) -> list[Any]:
        """Make the gradient of the effective weight that of the stored one; returns those of the gammas."""
        self.effective.grad = None
        if grad.is_sparse:
            grad = grad.to_dense()
        if grad.dtype != self.right.dtype:
            grad = grad.to(self.right.dtype)
        grads = self.parts.of(grad)
        shares = [one.take_gradient(part) for one, part in zip(self.matrices(), grads, strict=True)]
        # In place where the matrices are views of the gradient, which they are but for interleaved groups of heads.
        self.stored.grad = grad if self.parts.groups == 1 else self.parts.join(grads)
        return shares

    def finish(self) -> None:
        """Put the matrices that were written into the layer's weight, where they are not in it."""
        if not self._is_in_place:
            self.effective.copy_(self.parts.join([one.target for one in self._matrices]))
