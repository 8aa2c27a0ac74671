"""A factor on residual branches that lives in the map that ends them: b = s * (W h + c) = (s W) h + s c.

Nothing of the model's code runs differently: no hook, no other `forward`, torch's fused paths included. Folding it away is
one product. Shared by the methods that scale branches.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from tameformer.errors import PatchError
from tameformer.patch.adapters import Branch, branches
from tameformer.patch.parametrized import chain_of, parametrize, unparametrize
from tameformer.patch.select import Selector


class OutputScale(nn.Module):
    """The parametrization of a branch's last weight: its outputs times `scale`, one number (1,) or one an output (dim,)."""

    def __init__(self, method: str, scale: Tensor, *, is_transposed: bool):
        super().__init__()
        self.method, self.is_transposed = method, is_transposed
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)

    def forward(self, stored: Tensor) -> Tensor:
        """The scaled weight or bias, shaped as it is stored."""
        return _scaled(stored, self.scale, self.is_transposed)


class BorrowedScale(nn.Module):
    """The same with the scale of another `OutputScale`, which alone owns it: one name in a checkpoint, one in an optimizer."""

    def __init__(self, home: OutputScale, *, is_transposed: bool):
        super().__init__()
        self.method, self.is_transposed = home.method, is_transposed
        self._home = (home,)  # a tuple, so that it is not registered as a part of this module

    def forward(self, stored: Tensor) -> Tensor:
        """The scaled weight or bias, shaped as it is stored."""
        return _scaled(stored, self._home[0].scale, self.is_transposed)


def _scaled(stored: Tensor, scale: Tensor, is_transposed: bool) -> Tensor:
    rows = scale.ndim == 1 and stored.ndim == 2 and not is_transposed
    return stored * (scale.unsqueeze(1) if rows else scale).to(stored.dtype)


def chosen_branches(model: nn.Module, where: Selector | None) -> list[Branch]:
    """The branches whose last linear map `where` takes; None takes all.

    Raises:
        PatchError: There is none.
    """
    found = branches(model)
    taken = [branch for branch in found if where is None or where(branch.output.name, branch.output.module)]
    if not taken:
        outputs = ", ".join(branch.output.name for branch in found)
        raise PatchError(f"where= takes no residual branch; they end in {outputs}")
    return taken


class ScaledBranches:
    """Branches with a factor each, put on one by one; what is needed to take them off and to fold them."""

    def __init__(self, method: str, undo: ExitStack):
        self.method, self._undo = method, undo
        self._scaled: list[tuple[Branch, str]] = []

    def scale(self, branch: Branch, scale: Tensor | OutputScale) -> OutputScale:
        """Put a factor on a branch: a parameter, a constant, or what another branch has already.

        Raises:
            PatchError: This method scales the branch already.
        """
        output, home = branch.output, scale if isinstance(scale, OutputScale) else None
        for name in filter(None, (output.weight, output.bias)):
            if home is not None:
                part: nn.Module = BorrowedScale(home, is_transposed=output.is_transposed)
            else:
                assert not isinstance(scale, OutputScale)
                part = home = OutputScale(self.method, scale, is_transposed=output.is_transposed)
            _register(self._undo, output.module, name, part, f"{output.name}.{name}", self.method)
            self._scaled.append((branch, name))
        assert home is not None
        return home

    def check_foldable(self, model: nn.Module) -> None:
        """Refuse where the products cannot stand in the plain weights.

        Raises:
            PatchError: A weight serves at other places too, or another method works on it.
        """
        owners = weight_owners(model)
        for branch, name in self._scaled:
            chain = self._chain(branch, name)
            if len(chain) > 1:
                others = ", ".join(type(part).__name__ for part in chain if not _is_ours(part, self.method))
                raise PatchError(f"{self.method} cannot be folded at {branch.output.name}: bake {others} first")
            if owners[id(chain.original)] > 1:
                raise PatchError(
                    f"{self.method} cannot be folded at {branch.output.name}: its {name} serves at other places too; "
                    f"keep the patch, or untie the weight"
                )

    @torch.no_grad()
    def products(self) -> list[tuple[Tensor, Tensor]]:
        """Each stored tensor and what it will hold when the factor is folded in."""
        found = []
        for branch, name in self._scaled:
            value = getattr(branch.output.module, name).detach().clone()
            found.append((self._chain(branch, name).original, value))
        return found

    def _chain(self, branch: Branch, name: str) -> ParametrizationList:
        chain = chain_of(branch.output.module, name)
        if chain is None:
            raise PatchError(f"{self.method} is no longer on {branch.output.name}; was it removed by other means?")
        return chain


def bake_products(scaled: ScaledBranches, model: nn.Module, undo: ExitStack) -> None:
    """Fold all factors into the plain weights and take the machinery off."""
    scaled.check_foldable(model)
    products = scaled.products()
    undo.close()
    store(products)


@torch.no_grad()
def store(products: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write each value into its tensor."""
    for stored, value in products:
        stored.copy_(value)


def weight_owners(model: nn.Module) -> Counter[int]:
    """How many places hold each parameter, by its identity; a module that is held twice counts once."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def check_plain(found: Sequence[Branch], method: str) -> None:
    """Refuse weights that another method computes, where starting values are to be written into them.

    Raises:
        PatchError: There is one.
    """
    for branch in found:
        for matrix in (branch.output, *branch.inputs):
            if chain_of(matrix.module, matrix.weight) is not None:
                raise PatchError(
                    f"{method} writes starting values, but {matrix.name}.{matrix.weight} is computed by another patch; "
                    f"apply {method} first"
                )


def _is_ours(part: nn.Module, method: str) -> bool:
    return isinstance(part, (OutputScale, BorrowedScale)) and part.method == method


def _register(undo: ExitStack, module: nn.Module, name: str, part: nn.Module, label: str, method: str) -> None:
    if any(_is_ours(other, method) for other in chain_of(module, name) or ()):
        raise PatchError(f"{method} is on {label} already; remove or bake it first")
    parametrize(module, name, part)
    module.get_submodule("parametrizations").train(module.training)
    undo.callback(unparametrize, module, name, part)
