"""sigmaReparam beside the optimizer: plain layers hold the effective weight, their stored weight and gamma live here.

The same method as `sigma_reparam`, at its lowest cost: nothing is computed in forward or backward, all work is done once per
optimizer step. In exchange the loop must keep to three things, which is why it is not the default:

- the optimizer is built over `groups`, so that it steps the stored weights, and given to `follow`;
- gradients are cleared by `model.zero_grad()` where a step is left out (the optimizer does not know the layers' weights);
- a gradient scaler has no gradients to look at: train in fp32 or bf16. Clipping sees the gradients of the effective weights.

A checkpoint holds `state_dict()` beside those of model and optimizer.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.patch import Selector, select
from tameformer.stabilizers.power_iteration import image_and_sigma, power_step, power_steps
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
from tameformer.stabilizers.weight_parts import Parts, Split, is_transposed, split_fused


class SigmaBesideOptimizer:
    """The stored weights and gammas of a model whose layers hold the effective weights.

    Args:
        model: Not sharded. Its weights stay the parameters they are; a tied one counts once.
        where: As in `sigma_reparam`, and so are the others.
        gamma: Where gamma starts; None is at sigma.
        gain: As in `sigma_reparam`.
        split: The parts of fused projections.
        steps_at: Power steps after each update.

    Raises:
        PatchError: As `sigma_reparam` does.

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
    ) -> None:
        layers = select(model, where, looked_for="linear layers, convolutions, attention projections")
        parents = {id(child): parent for parent in model.modules() for child in parent.children()}
        self.steps_at, self.updates = steps_at, 0
        self._weights: dict[str, _Weight] = {}
        for end, weight in plain_weights(layers):
            if any(weight is other.effective for other in self._weights.values()):
                continue
            rows = split(end.path, end.module, parents.get(id(end.module)))
            parts = Parts(weight.shape, transposed=is_transposed(end.module), rows=rows)
            # For its state at the start; it is never called.
            start = SigmaReparam(weight, parts, start=start_at(gamma, gain), steps_at=steps_at, name=end.full)
            self._weights[end.full] = _Weight(weight, parts, start.gamma, start.left)

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
        return [*found, {**(gamma_settings or {}), "params": [weight.gamma for weight in self._weights.values()]}]

    def follow(self, optimizer: Optimizer) -> None:
        """Give the optimizer its gradients before each step, and the layers their weights after it.

        Raises:
            ValueError: It was not built over `groups`, so that weights would stand still.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, weight in self._weights.items():
            is_missed = weight.stored.requires_grad and id(weight.stored) not in held
            if is_missed or id(weight.effective) in held:
                raise ValueError(
                    f"expected an optimizer over the stored weight of {name}, got one "
                    f"{'without it' if is_missed else 'over the weight itself'}; build it over groups(...) of this object"
                )
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self._advance())

    def state_dict(self) -> dict[str, Tensor]:
        """Stored weights, gammas and singular vectors, by the names of the weights."""
        state = {"updates": torch.tensor(self.updates)}
        for name, weight in self._weights.items():
            state |= {f"{name}.{key}": tensor for key, tensor in weight.state().items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, and write the layers' weights from it.

        Raises:
            KeyError: A weight is not in it.
        """
        self.updates = int(state["updates"])
        for name, weight in self._weights.items():
            for key, tensor in weight.state().items():
                tensor.copy_(state[f"{name}.{key}"])
            weight.write()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for weight in self._weights.values():
            if weight.effective.grad is not None:
                weight.take_gradient(weight.effective.grad)

    @torch.no_grad()
    def _advance(self) -> None:
        steps, weights = self.steps_at(self.updates), list(self._weights.values())
        if weights[0].left.device.type == "cpu":
            # One after the other: what its power step has read is in the cache when the layer's weight is written. And the last
            # first: the optimizer has just come by there, and the next forward pass begins at the other end.
            for weight in reversed(weights):
                for left, matrix, image in zip(weight.lefts, weight.matrices(), weight.images, strict=True):
                    left.copy_(power_step(matrix, left, image, steps=steps))
                weight.write()
        else:
            matrices = [matrix for weight in weights for matrix in weight.matrices()]
            lefts = [left for weight in weights for left in weight.lefts]
            images = [image for weight in weights for image in weight.images]
            for left, advanced in zip(lefts, power_steps(matrices, lefts, images, steps=steps), strict=True):
                left.copy_(advanced)
            for weight in weights:
                weight.write()
        self.updates += 1


class _Weight:
    """One weight of the model and what stands behind it.

    Args:
        effective: The layer's parameter.
        parts: The matrices in it.
        gamma: One number for each.
        left: Their left singular vectors, end to end.
    """

    def __init__(self, effective: nn.Parameter, parts: Parts, gamma: nn.Parameter, left: Tensor) -> None:
        wide = effective.detach().to(left.dtype, copy=True, memory_format=torch.contiguous_format)
        self.effective, self.stored = effective, nn.Parameter(wide, requires_grad=effective.requires_grad)
        self._stored = (
            self.stored.detach()
        )  # what is done to a parameter takes longer than to a plain tensor: 6 us a matrix
        self.parts, self.gamma, self.left = parts, gamma, left
        self.lefts = parts.split(left)
        self.images: list[Tensor] = []  # storedᵀ left of each matrix
        self.sigmas: list[Any] = []
        self.factors: list[Any] = []  # gamma / sigma of each
        with torch.no_grad():
            self.write()

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return {"stored": self.stored.detach(), "gamma": self.gamma.detach(), "left": self.left}

    def matrices(self) -> list[Tensor]:
        """Of the stored weight."""
        return self.parts.of(self._stored)

    def take_gradient(self, grad: Tensor) -> None:
        """Make the gradient of the effective weight those of the stored one and of gamma."""
        self.effective.grad = None
        if grad.is_sparse:
            grad = grad.to_dense()
        if grad.dtype != self.left.dtype:
            grad = grad.to(self.left.dtype)
        grads, shares = self.parts.of(grad), []
        for of_grad, matrix, left, image, factor, sigma in zip(
            grads, self.matrices(), self.lefts, self.images, self.factors, self.sigmas, strict=True
        ):
            share = number(dot(of_grad, matrix)) / sigma
            without_share(of_grad, factor, -factor * share / sigma, left, image, out=of_grad)
            shares.append(share)
        # In place where the matrices are views of the gradient, which they are but for interleaved groups of heads.
        self.stored.grad = grad if self.parts.groups == 1 else self.parts.join(grads)
        self.gamma.grad = stacked(shares, like=self.gamma)

    def write(self) -> None:
        """The layer's weight from the stored one, and what the next gradient needs."""
        matrices, gammas = self.matrices(), numbers(self.gamma)
        in_place = self.parts.groups == 1 and self.effective.is_contiguous()
        targets = self.parts.of(self.effective.detach()) if in_place else [None] * len(matrices)
        self.images, self.sigmas, self.factors, scaled = [], [], [], []
        for matrix, left, gamma, target in zip(matrices, self.lefts, gammas, targets, strict=True):
            image, sigma = image_and_sigma(matrix, left)
            sigma = number(sigma)
            self.images.append(image)
            self.sigmas.append(sigma)
            self.factors.append(gamma / sigma)
            scaled.append(torch.mul(matrix, gamma / sigma, out=target))
        if not in_place:
            self.effective.copy_(self.parts.join(scaled))
