"""Low-rank changes of frozen weights (Hu et al. 2021, "LoRA", arXiv:2106.09685), made by the package `peft` (extra `peft`).

    effective weight = W + alpha / rank * B A

with W frozen, A and B of `rank` rows and columns, and B zero at the start.
"""

from contextlib import ExitStack
from typing import Any

from torch import nn

from tameformer.errors import PatchError, missing_extra
from tameformer.finetune.places import places
from tameformer.patch import PatchHandle, Selector, is_linear, select
from tameformer.stabilizers.weight_parts import is_transposed


def lora(
    model: nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, where: Selector | None = None
) -> PatchHandle:
    """Freeze a model but for low-rank changes of its linear layers and what is after its layers; call it before the optimizer.

    Outputs are unchanged at the start. `bake` adds the changes to the weights, and the model is an ordinary one again; `remove`
    gives the frozen weights back as they were. Both let everything learn again that did before.

    Args:
        model: Any model with repeated layers; their classes are kept.
        rank: Of each change, at least 1.
        alpha: Divided by the rank, the factor on it.
        dropout: Of the change's input.
        where: The layers; None takes all linear layers inside the repeated ones.

    Raises:
        ImportError: `peft` is not installed.
        PatchError: Nothing matches, or a layer is tied or patched already.
        ValueError: `rank` is below 1.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        >>> model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(8, 2))
        >>> with lora(model, rank=2, where=lambda name, module: name.endswith("linear1")) as handle:
        ...     handle.names, [one.shape for one in handle.new_parameters]
        (('0.layers.0.linear1',), [torch.Size([2, 8]), torch.Size([16, 2])])
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise missing_extra("peft", "peft") from error
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    found = places(model)
    inside = {place.layer for place in found.values() if place.below >= 0 and place.above}

    def in_layers(name: str, module: nn.Module) -> bool:
        # The output projection of torch's attention is never called as a module.
        return (
            is_linear(name, module) and "NonDynamically" not in type(module).__name__ and name.startswith(tuple(inside))
        )

    chosen = select(model, where or in_layers, looked_for="linear layers inside repeated layers")
    _check(model, chosen)
    learned = {name: one.requires_grad for name, one in model.named_parameters()}
    parameters = dict(model.named_parameters())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=list(chosen),
        fan_in_fan_out=all(is_transposed(module) for module in chosen.values()),
    )
    with ExitStack() as undo:
        undo.callback(_learn, parameters, learned)
        tuner: Any = LoraModel(model, config, "default")
        undo.callback(tuner.unload)
        for name, place in found.items():
            if place.above == 0 and learned[name]:
                parameters[name].requires_grad_(True)
        new = [one for name, one in model.named_parameters() if "lora_" in name]
        kept = undo.pop_all()

    def bake() -> None:
        tuner.merge_and_unload()
        _learn(parameters, learned)

    settings = {"rank": rank, "alpha": alpha, "dropout": dropout}
    return PatchHandle("lora", tuple(chosen), kept, bake=bake, new_parameters=new, settings=settings)


def _check(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    counts: dict[int, int] = {}
    for _, one in model.named_parameters(remove_duplicate=False):
        counts[id(one)] = counts.get(id(one), 0) + 1
    for name, module in chosen.items():
        weight = module._parameters.get("weight")
        if weight is None:
            raise PatchError(f"{name} is patched already; remove that patch, or leave the layer out with where=")
        if counts[id(weight)] > 1:
            raise PatchError(f"{name}.weight is tied to another weight; untie it, or leave the layer out with where=")


def _learn(parameters: dict[str, nn.Parameter], learned: dict[str, bool]) -> None:
    for name, one in parameters.items():
        one.requires_grad_(learned[name])
