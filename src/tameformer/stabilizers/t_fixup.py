"""Transformers without norms, made trainable by their starting values.

Huang et al. 2020, "Improving Transformer Optimization Through Better Initialization", ICML (T-Fixup), section 3.3.

Differs from the authors' code: weights are scaled from what the model has, right for a model that starts by Xavier's rule
with token embeddings of deviation 1 / sqrt(dim); the factor sqrt(2) on values, which undoes the authors' gain on fused
projections, is left out likewise. A stack without cross-attention counts as encoder. Not for a pretrained model.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from tameformer.patch.adapters import Branch, branches, num_layers, stacks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.unwrapped import unwrapped
from tameformer.stabilizers.branch_norms import remove_branch_norms
from tameformer.stabilizers.branch_scale import check_plain
from tameformer.stabilizers.starting_values import Start, keep_starts, times, write_starts


def t_fixup_constants(num_layers: int, *, is_decoder: bool = False) -> tuple[float, float]:
    """Factors on the weights of branches and on the token embeddings.

    Example:
        >>> t_fixup_constants(16), t_fixup_constants(9, is_decoder=True)[1] == 81**-0.25
        ((0.335, 0.28867513459481287), True)
    """
    embedding = (9 * num_layers) ** -0.25
    return (embedding if is_decoder else 0.67 * num_layers**-0.25), embedding


def t_fixup(model: nn.Module, *, embeddings: Sequence[nn.Module] | None = None) -> PatchHandle:
    """Take the norms of all branches out, and scale values, outputs, feed-forward weights and token embeddings once, in place.

    A norm at the end of a stack stays. Baked, the model keeps no norms in its layers, and its state dict no entries of them.

    Args:
        model: A fresh model with layers that we know, before its optimizer exists.
        embeddings: The token embeddings, encoder's first; None finds ours and those of Hugging Face. Tied ones are scaled once.

    Raises:
        PatchError: The layers are unknown, have lost their norms or have this already, or another patch computes their weights.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> t_fixup(model)
        PatchHandle(t_fixup, 4 places, 0 new parameters)
    """
    model = unwrapped(model)
    found = branches(model)
    check_plain(found, "t_fixup")
    starts, sides = [], dict[bool, float]()
    for stack in stacks(found).values():
        is_decoder = any(branch.kind == "cross_attention" for branch in stack)
        factor, sides[is_decoder] = t_fixup_constants(num_layers(stack), is_decoder=is_decoder)
        starts += [
            Start(matrix.module, matrix.weight, matrix.view(), times(factor))
            for branch in stack
            for matrix in _scaled(branch)
        ]
    tokens: Iterable[Any] = _token_embeddings(model) if embeddings is None else embeddings
    for index, embedding in enumerate(tokens):  # with two, the second is the decoder's
        factor = sides.get(index > 0, next(iter(sides.values())))
        starts.append(Start(embedding, "weight", embedding.get_parameter("weight"), times(factor)))
    written = ExitStack()
    with ExitStack() as undo:
        undo.push(written)
        remove_branch_norms(undo, model, found, "t_fixup")
        write_starts(written, starts, "t_fixup")
        kept = undo.pop_all()
    return PatchHandle(
        "t_fixup",
        [branch.name for branch in found],
        kept,
        bake=lambda: keep_starts(starts, "t_fixup"),
    )


def _scaled(branch: Branch):
    return [branch.output, *([branch.value] if branch.value is not None else branch.inputs)]


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    """Ours by their class, Hugging Face's by what the model says; encoder's first."""
    ours = [module for module in model.modules() if type(module).__name__ == "TokenEmbedding"]
    if ours or not hasattr(model, "get_input_embeddings"):
        return ours
    parts: list[Any] = [model]
    for name in ("get_encoder", "get_decoder"):
        part = getattr(model, name)() if getattr(getattr(model, "config", None), "is_encoder_decoder", False) else None
        parts += [] if part is None else [part]
    found = [part.get_input_embeddings() for part in (parts[1:] or parts)]
    return [module for module in found if isinstance(module, nn.Embedding)]
