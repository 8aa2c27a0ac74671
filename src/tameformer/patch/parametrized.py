"""Torch's parametrizations on weights that we did not write, in a form that can be taken back exactly.

`torch.nn.utils.parametrize` computes a weight anew on every access, so that whoever reads it (a functional call, a fused
kernel) gets the computed one. Two things it lacks are here: the parameters come back in the order they had, which
optimizers save their state by, and one parametrization can be taken out of a chain of several.
"""

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization
from torch.nn.utils.parametrize import remove_parametrizations as _remove_all

from tameformer.errors import PatchError

_ORDER = "parameter_order"  # on the dict of a module's parametrizations, which goes with the last of them


def parametrize(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Let `module.<name>` be `parametrization(weight)` from now on; one after another where there are several.

    The parametrization must keep shape and dtype; it is not called here.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> parametrize(layer, "weight", nn.Tanh())
        >>> [name for name, _ in layer.named_parameters()]
        ['bias', 'parametrizations.weight.original']
    """
    order = None if is_parametrized(module) else tuple(module._parameters)
    register_parametrization(module, name, parametrization, unsafe=True)
    if order is not None:
        object.__setattr__(module.parametrizations, _ORDER, order)


def unparametrize(module: nn.Module, name: str, parametrization: nn.Module) -> None:
    """Take one parametrization back; after the last one, `module.<name>` is the same parameter at its old place.

    Raises:
        PatchError: The parametrization is not on that weight.

    Example:
        >>> layer, tanh = nn.Linear(2, 2), nn.Tanh()
        >>> parametrize(layer, "weight", tanh)
        >>> unparametrize(layer, "weight", tanh)
        >>> list(layer.state_dict()), type(layer).__name__
        (['weight', 'bias'], 'Linear')
    """
    chain = chain_of(module, name)
    found = [place for place, member in enumerate(chain or ()) if member is parametrization]
    if chain is None or not found:
        raise PatchError(
            f"expected {type(parametrization).__name__} on {name} of {type(module).__name__}, found "
            f"{[type(member).__name__ for member in chain or ()]}; was it removed by other means?"
        )
    if len(chain) > 1:
        del chain[found[0]]
        return
    order = getattr(module.parametrizations, _ORDER, ())
    _remove_all(module, name, leave_parametrized=False)
    present = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({key: present.pop(key) for key in order if key in present} | present)


def chain_of(module: nn.Module, name: str) -> ParametrizationList | None:
    """The parametrizations of a weight with the `original` that they start from; None where it has none."""
    if not is_parametrized(module, name):
        return None
    chain = module.parametrizations[name]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    assert isinstance(chain, ParametrizationList)
    return chain
