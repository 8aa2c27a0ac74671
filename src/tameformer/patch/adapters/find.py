"""The residual branches of a model, whichever of the known families its layers come from."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch.adapters.branch import Branch
from tameformer.patch.adapters.known import FAMILIES
from tameformer.patch.blocks import blocks
from tameformer.patch.unwrapped import unwrapped


def branches(model: nn.Module) -> list[Branch]:
    """All residual branches, layer by layer in the order in which they run.

    Raises:
        PatchError: There is no layer that we know; it names the families that we know.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> [branch.name for branch in branches(nn.TransformerEncoder(layer, 1))]
        ['layers.0.self_attn', 'layers.0.linear2']
    """
    model = unwrapped(model)
    found: dict[nn.Module, list[Branch]] = {}
    uses: Counter[nn.Module] = Counter()
    for name, module, members in _layers(model, ""):
        found.setdefault(module, [replace(member, stack=name.rpartition(".")[0]) for member in members])
        uses[module] += 1
    if not found:
        kinds = sorted({type(block).__name__ for block in blocks(model).values()}) or ["no repeated layers"]
        raise PatchError(
            f"{type(model).__name__} has nothing to change: looked for residual branches in layers of "
            f"{'; '.join(FAMILIES)}, found {', '.join(kinds)}"
        )
    return [replace(member, uses=uses[module]) for module, members in found.items() for member in members]


def stacks(found: list[Branch]) -> dict[str, list[Branch]]:
    """The branches of each list of layers, in order."""
    grouped: dict[str, list[Branch]] = {}
    for branch in found:
        grouped.setdefault(branch.stack, []).append(branch)
    return grouped


def num_layers(stack: list[Branch]) -> int:
    """How many layers run in a stack; one that the model holds twice runs twice."""
    return sum({branch.block: branch.uses for branch in stack}.values())


def num_branches(stack: list[Branch]) -> int:
    """How many branches run in a stack."""
    return sum(branch.uses for branch in stack)


def _layers(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, list[Branch]]]:
    for name, child in module._modules.items():
        if child is None:
            continue
        path = f"{prefix}{name}"
        members = next(filter(None, (family(path, child) for family in FAMILIES.values())), None)
        if members:
            yield path, child, members
        else:
            yield from _layers(child, f"{path}.")
