"""Size of the gradient in each module, alone and against the epsilon of its optimizer.

Adam divides by sqrt(v) + epsilon. A gradient that has fallen to epsilon's size moves its weights less than the learning rate
says, and in the end not at all (Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training
instabilities", arXiv:2309.14322, section 3.4).
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tameformer.patch import unwrapped
from tameformer.probes.probe import Probe
from tameformer.shapes import Float, Int
from tameformer.tensors import is_ordinary


def joint_norms(norms: Float[Tensor, " tensors"], members: Int[Tensor, "groups most"]) -> Float[Tensor, " groups"]:
    """L2 norm of each group of tensors from the norms of its members, numbers of tensors; -1 fills a row up.

    Example:
        >>> joint_norms(torch.tensor([3.0, 4.0, 7.0]), torch.tensor([[0, 1], [2, -1]]))
        tensor([5., 7.])
    """
    padded = torch.cat([norms, norms.new_zeros(1)])
    return torch.linalg.vector_norm(padded[members], dim=1)


class GradientNorm(Probe):
    """L2 norm of the gradient of each module's own parameters, as `diag/grad_norm/<module>`; reads each gradient once.

    The gradients are those that the optimizer gets, so after clipping. Parameters without one do not count, tied ones count
    where they come first. Sums of squares are in fp32: a norm above 1e19 reads as infinite.
    """

    def __init__(self, model: nn.Module) -> None:
        self.unseen = self._unseen = {}
        self._slots = [
            (f"{name}.{attribute}" if name else attribute, module, attribute)
            for name, module in unwrapped(model).named_modules()
            for attribute in module._parameters
        ]
        self._measured: tuple[tuple[tuple[str, nn.Parameter], ...], Tensor] | None = None
        self._rows: dict[tuple[str, ...], Tensor] = {}
        self._told: tuple[tuple[int, ...], Tensor] | None = None
        self._order: tuple[tuple[int, ...], tuple[int, ...], Tensor] | None = None

    def on_begin(self) -> None:
        """Forget the last step."""
        self._measured = self._told = None

    def take_norms(self, parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        """Keep what clipping has computed, to spare the gradients another pass."""
        self._told = tuple(map(id, parameters)), norms

    @torch.no_grad()
    def on_gradients(self) -> None:
        """Take the norms; a second call in one step finds them taken."""
        if self._measured is not None:
            return
        parameters, gradients = [], []
        for name, parameter in self._trained():
            gradient = parameter.grad
            if gradient is None:
                continue
            if not is_ordinary(gradient):
                self._unseen[name] = f"a {type(gradient).__name__}, of which this process may hold a part only"
                continue
            parameters.append((name, parameter))
            gradients.append(gradient.coalesce().values() if gradient.is_sparse else gradient)
        if gradients:
            told = self._from_clipping([id(parameter) for _, parameter in parameters])
            self._measured = tuple(parameters), _norms(gradients) if told is None else told

    def _from_clipping(self, wanted: Sequence[int]) -> Tensor | None:
        """The norms in the order wanted, where clipping told them all."""
        if self._told is None or not set(wanted) <= set(self._told[0]):
            return None
        known, norms = self._told
        if self._order is None or self._order[:2] != (known, tuple(wanted)) or self._order[2].device != norms.device:
            places = {key: place for place, key in enumerate(known)}
            order = torch.tensor([places[key] for key in wanted], device=norms.device)
            self._order = known, tuple(wanted), order  # one copy to the device, not one a step
        return norms[self._order[2]].float()

    def measured(self) -> tuple[Sequence[tuple[str, nn.Parameter]], Tensor]:
        """The parameters that had a gradient in the last observed step, by name, and the norms of their gradients."""
        return self._measured or ((), torch.empty(0))

    def read(self) -> Mapping[str, Tensor]:
        """One value a module."""
        parameters, norms = self.measured()
        return {f"diag/grad_norm/{module}": value for module, value in self.by_module(parameters, norms).items()}

    def by_module(self, parameters: Sequence[tuple[str, nn.Parameter]], norms: Tensor) -> dict[str, Tensor]:
        """Norms of parameters joined by the module that owns them."""
        modules = by_owner([name for name, _ in parameters])
        if not modules:
            return {}
        names = tuple(name for name, _ in parameters)
        if names not in self._rows or self._rows[names].device != norms.device:
            most = max(map(len, modules.values()))
            rows = [numbers + [-1] * (most - len(numbers)) for numbers in modules.values()]
            self._rows = {names: torch.tensor(rows, device=norms.device)}  # one copy to the device, not one a step
        return dict(zip(modules, joint_norms(norms, self._rows[names]).unbind(), strict=True))

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters as they are now, each once."""
        seen: set[int] = set()
        for name, module, attribute in self._slots:
            parameter = module._parameters.get(attribute)
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter


class GradientOverEpsilon(Probe):
    """RMS of each module's gradient over the epsilon of its optimizer, as `diag/grad_rms_over_epsilon/<module>`.

    Below 1 the update vanishes, below 100 it is 1 % smaller than the learning rate says. Only for optimizers whose groups have
    a positive number `eps`; others are named in `unseen`.

    Args:
        model: Whose parameters.
        optimizers: Who updates them.
        norms: A probe of the same model whose pass over the gradients serves both; None takes one of its own.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], *, norms: GradientNorm | None = None) -> None:
        self.optimizers, self.norms = tuple(optimizers), GradientNorm(model) if norms is None else norms
        self.unseen = self._unseen = {}
        self._factors: dict[tuple[float, ...], Tensor] = {}

    def on_begin(self) -> None:
        """Forget the last step."""
        self.norms.on_begin()

    def take_norms(self, parameters: Sequence[nn.Parameter], norms: Tensor) -> None:
        """Keep what clipping has computed."""
        self.norms.take_norms(parameters, norms)

    def on_gradients(self) -> None:
        """Take the norms unless they are taken."""
        self.norms.on_gradients()

    @torch.no_grad()
    def read(self) -> Mapping[str, Tensor]:
        """One value a module whose parameters all have an epsilon."""
        parameters, norms = self.norms.measured()
        epsilons = self._epsilons(parameters)
        owners = by_owner([name for name, _ in parameters])
        factors = [0.0] * len(parameters)
        for numbers in owners.values():
            count = sum(parameters[number][1].numel() for number in numbers)
            for number in numbers:
                factors[number] = 1 / (epsilons.get(parameters[number][0], math.inf) * math.sqrt(count))
        key = tuple(factors)
        if key not in self._factors or self._factors[key].device != norms.device:
            self._factors = {key: torch.tensor(factors, dtype=torch.float32, device=norms.device)}
        values = self.norms.by_module(parameters, norms * self._factors[key])
        return {
            f"diag/grad_rms_over_epsilon/{module}": value
            for module, value in values.items()
            if all(parameters[number][0] in epsilons for number in owners[module])
        }

    def _epsilons(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> dict[str, float]:
        """Epsilon by the name of the parameter."""
        found: dict[int, object] = {}
        kinds: dict[int, str] = {}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found[id(parameter)], kinds[id(parameter)] = group.get("eps"), type(optimizer).__name__
        usable: dict[str, float] = {}
        for name, parameter in parameters:
            epsilon = found.get(id(parameter))
            if isinstance(epsilon, float) and epsilon > 0:
                usable[name] = epsilon
            else:
                kind = kinds.get(id(parameter))
                self._unseen[name] = (
                    "in no optimizer" if kind is None else f"{kind} has eps={epsilon!r}, not a number above 0"
                )
        return usable


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """Their L2 norms, (gradients,), in fp32."""
    # `get_total_norm` makes the same call and keeps the total only; called once a module it takes twice as long.
    norms = torch._foreach_norm(gradients, 2, torch.float32)  # pyright: ignore
    return torch.stack([norm.to(norms[0].device, non_blocking=True) for norm in norms])


def by_owner(names: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the parameters of each module; one of the model itself stands under its own name.

    What a parametrization of a weight holds counts as the module's own: a key's bias alone, say, has no gradient at all,
    since it shifts all logits of a query alike.

    Example:
        >>> by_owner(["up.parametrizations.weight.original", "up.bias", "token"])
        {'up': [0, 1], 'token': [2]}
    """
    owners: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        owner = name.rpartition(".")[0] or name
        owners.setdefault(owner.partition(".parametrizations.")[0], []).append(number)
    return owners
