"""Where the repeated layers of a model sit, by structure alone: no list of known classes."""

from torch import nn


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The model's layers by name: the members of its outermost lists of alike modules that have modules inside.

    Example:
        >>> list(blocks(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 2)))
        ['layers.0', 'layers.1']
    """
    found: dict[str, nn.Module] = {}
    _collect(model, "", found)
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, nn.Module]) -> None:
    members = list(module.named_children())
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and _alike([member for _, member in members]):
        found.update((f"{prefix}{name}", member) for name, member in members)
        return
    for name, member in members:
        _collect(member, f"{prefix}{name}.", found)


def _alike(members: list[nn.Module]) -> bool:
    """Whether these are layers: one class, with modules inside, and something to train."""
    return (
        len({type(member) for member in members}) == 1
        and all(any(True for _ in member.children()) for member in members)
        and any(True for member in members for _ in member.parameters())
    )
