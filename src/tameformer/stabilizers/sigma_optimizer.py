"""sigmaReparam beside the optimizer: plain layers hold the effective weight, their stored weight and gamma live here.

The same method as `sigma_reparam`, at its lowest cost: nothing is computed in forward or backward, all work is done once per
optimizer step. In exchange the loop must keep to three things, which is why it is not the default:

- the optimizer is built over `groups`, so that it steps the stored weights, and given to `follow`;
- gradients are cleared by `model.zero_grad()` where a step is left out (the optimizer does not know the layers' weights);
- a gradient scaler has no gradients to look at: train in fp32 or bf16. Clipping sees the gradients of the effective weights.

A checkpoint holds `state_dict()` beside those of model and optimizer.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.patch import Selector, select
from tameformer.stabilizers.power_iteration import power_steps
from tameformer.stabilizers.sigma_reparam import is_matrix_layer, more_at_first, plain_weights, start_at
from tameformer.stabilizers.sigma_weight import SigmaReparam, StepsAt, dot, numbers, stacked, without_share
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
        self.names: list[str] = []
        self._effective: list[nn.Parameter] = []
        self._stored: list[nn.Parameter] = []
        self._ones: list[SigmaReparam] = []  # for their state and their way to the matrices; never called
        for end, weight in plain_weights(layers):
            if any(weight is other for other in self._effective):
                continue
            rows = split(end.path, end.module, parents.get(id(end.module)))
            parts = Parts(weight.shape, transposed=is_transposed(end.module), rows=rows)
            one = SigmaReparam(weight, parts, start=start_at(gamma, gain), steps_at=steps_at, name=end.full)
            wide = weight.detach().to(one.left.dtype, copy=True, memory_format=torch.contiguous_format)
            self.names.append(end.full)
            self._effective.append(weight)
            self._stored.append(nn.Parameter(wide, requires_grad=weight.requires_grad))
            self._ones.append(one)
        self._images: list[list[Tensor]] = []
        self._sigmas: list[Sequence[Any]] = []
        self._write()

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
        stored = {id(weight): mine for weight, mine in zip(self._effective, self._stored, strict=True)}
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
        return [*found, {**(gamma_settings or {}), "params": [one.gamma for one in self._ones]}]

    def follow(self, optimizer: Optimizer) -> None:
        """Give the optimizer its gradients before each step, and the layers their weights after it."""
        optimizer.register_step_pre_hook(lambda *_: self._take_gradients())
        optimizer.register_step_post_hook(lambda *_: self._advance())

    def state_dict(self) -> dict[str, Tensor]:
        """Stored weights, gammas and singular vectors, by the names of the weights."""
        state = {"updates": torch.tensor(self.updates)}
        for name, stored, one in zip(self.names, self._stored, self._ones, strict=True):
            state |= {f"{name}.stored": stored.detach(), f"{name}.gamma": one.gamma.detach(), f"{name}.left": one.left}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, and write the layers' weights from it.

        Raises:
            KeyError: A weight is not in it.
        """
        self.updates = int(state["updates"])
        for name, stored, one in zip(self.names, self._stored, self._ones, strict=True):
            stored.copy_(state[f"{name}.stored"])
            one.gamma.copy_(state[f"{name}.gamma"])
            one.left.copy_(state[f"{name}.left"])
        self._write()

    @torch.no_grad()
    def _take_gradients(self) -> None:
        for weight, stored, one, images, sigmas in zip(
            self._effective, self._stored, self._ones, self._images, self._sigmas, strict=True
        ):
            if weight.grad is None:
                continue
            grad, weight.grad = weight.grad.to(stored.dtype), None
            grad = grad.to_dense() if grad.is_sparse else grad
            grads, lefts = one.parts.of(grad), one.parts.split(one.left)
            products = numbers([dot(*both) for both in zip(grads, one.parts.of(stored), strict=True)])
            shares = [product / sigma for product, sigma in zip(products, sigmas, strict=True)]
            for of_grad, left, image, gamma, sigma, share in zip(
                grads, lefts, images, numbers(one.gamma), sigmas, shares, strict=True
            ):
                without_share(of_grad, gamma / sigma, -gamma / sigma * share / sigma, left, image, out=of_grad)
            # In place where the matrices are views of the gradient, which they are but for interleaved groups of heads.
            stored.grad = grad if one.parts.groups == 1 else one.parts.join(grads)
            one.gamma.grad = stacked(shares, like=one.gamma)

    @torch.no_grad()
    def _advance(self) -> None:
        steps = self.steps_at(self.updates)
        for place, (one, stored) in enumerate(zip(self._ones, self._stored, strict=True)):
            lefts = power_steps(one.parts.of(stored), one.parts.split(one.left), self._images[place], steps=steps)
            one.left.copy_(lefts[0] if len(lefts) == 1 else torch.cat(lefts))
            self._images[place], self._sigmas[place] = self._write_one(place)  # the weight is still in the cache
        self.updates += 1

    @torch.no_grad()
    def _write(self) -> None:
        """The layers' weights from the stored ones, and what the next step needs."""
        written = [self._write_one(place) for place in range(len(self._ones))]
        self._images, self._sigmas = [images for images, _ in written], [sigmas for _, sigmas in written]

    def _write_one(self, place: int) -> tuple[list[Tensor], Sequence[Any]]:
        weight, stored, one = self._effective[place], self._stored[place], self._ones[place]
        matrices, lefts = one.parts.of(stored), one.parts.split(one.left)
        images = [torch.mv(matrix.t(), left) for matrix, left in zip(matrices, lefts, strict=True)]
        sigmas = numbers([torch.linalg.vector_norm(image) for image in images])
        factors = [gamma / sigma for gamma, sigma in zip(numbers(one.gamma), sigmas, strict=True)]
        if one.parts.groups == 1 and weight.is_contiguous():
            for target, matrix, factor in zip(one.parts.of(weight), matrices, factors, strict=True):
                torch.mul(matrix, factor, out=target)
        else:
            scaled = [matrix * factor for matrix, factor in zip(matrices, factors, strict=True)]
            weight.copy_(one.parts.join(scaled))
        return images, sigmas
