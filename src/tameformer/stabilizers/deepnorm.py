"""Post-norm with a constant on the shortcut and smaller starting weights: norm(a x + f(x)).

Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", arXiv:2203.00555 (DeepNorm), figure 2.

Differs from the paper's code: the constant divides the branch (and, squared, the norm's epsilon) instead of multiplying the
shortcut, which is the same function with the same gradients. Starting weights are scaled from what the model has, unless new
ones are asked for; queries and keys of a fused projection stay as they are. Not for Pre-norm.
"""

from contextlib import ExitStack
from typing import Literal

from torch import nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Branch, Matrix, branches, num_layers, stacks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.unwrapped import unwrapped
from tameformer.stabilizers.branch_scale import ScaledBranches, check_plain
from tameformer.stabilizers.shortcut_scale import check_post_norm, fix_shortcut, plan_fold
from tameformer.stabilizers.starting_values import Start, Write, keep_starts, times, write_starts, xavier_normal


def deepnorm_constants(
    num_encoder_layers: int, num_decoder_layers: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Alpha (shortcut) and beta (starting weights), of the encoder and of the decoder; a stack alone counts as encoder.

    Example:
        >>> [round(value, 3) for value in deepnorm_constants(6)[0]]
        [1.861, 0.38]
        >>> [round(value, 3) for pair in deepnorm_constants(6, 6) for value in pair]
        [1.418, 0.497, 2.06, 0.343]
    """
    n, m = num_encoder_layers, num_decoder_layers
    if n < 1 or m < 0:
        raise ValueError(f"expected at least 1 encoder layer and 0 decoder layers, got {n} and {m}")
    if not m:
        return ((2 * n) ** 0.25, (8 * n) ** -0.25), (1.0, 1.0)
    return (0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16)), ((3 * m) ** 0.25, (12 * m) ** -0.25)


def deepnorm(model: nn.Module, *, start: Literal["scale", "xavier", "keep"] = "scale") -> PatchHandle:
    """Scale shortcuts and starting weights of a Post-norm model by its depth.

    Args:
        model: A fresh Post-norm encoder, decoder or encoder-decoder, before its optimizer exists.
        start: "scale" multiplies values, outputs and feed-forward weights by beta once, in place, right for a model that
            starts by Xavier's rule; "xavier" draws all weights of the layers anew, normal with gain beta, 1 for queries and
            keys, and biases 0; "keep" leaves the weights, for a checkpoint that is loaded afterwards.

    Raises:
        PatchError: The layers are unknown, not Post-norm, or scaled already; or another patch computes their weights.
        ValueError: `start` is something else.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> deepnorm(model)
        PatchHandle(deepnorm, 4 places, 0 new parameters)
    """
    if start not in ("scale", "xavier", "keep"):
        raise ValueError(f"expected start to be 'scale', 'xavier' or 'keep', got {start!r}")
    model = unwrapped(model)
    found = branches(model)
    check_post_norm(found, "deepnorm")
    constants = _by_stack(stacks(found))
    if start != "keep":
        check_plain(found, "deepnorm")
    starts = [one for branch in found for one in _starts(branch, constants[branch.stack][1], start)]
    written = ExitStack()
    with ExitStack() as undo:
        undo.push(written)
        write_starts(written, starts, "deepnorm")
        patch = ExitStack()
        undo.push(patch)
        scaled = ScaledBranches("deepnorm", patch)
        for branch in found:
            fix_shortcut(patch, scaled, branch, constants[branch.stack][0])
        kept = undo.pop_all()

    def bake() -> None:
        scaled.check_foldable(model)
        folds = [
            plan_fold(model, stack, [constants[name][0]] * len(stack), "deepnorm")
            for name, stack in stacks(found).items()
        ]
        patch.close()
        keep_starts(starts, "deepnorm")
        for fold in folds:
            fold()

    return PatchHandle(
        "deepnorm",
        [branch.norm.name for branch in found if branch.norm is not None],
        kept,
        bake=bake,
        settings={"start": "keep"},
    )


def _by_stack(found: dict[str, list[Branch]]) -> dict[str, tuple[float, float]]:
    """Alpha and beta of each stack; one with cross-attention is a decoder, and then the other one its encoder."""
    decoders = [name for name, stack in found.items() if any(b.kind == "cross_attention" for b in stack)]
    encoders = [name for name in found if name not in decoders]
    if not decoders:
        return {name: deepnorm_constants(num_layers(found[name]))[0] for name in encoders}
    if len(decoders) != 1 or len(encoders) != 1:
        raise PatchError(
            f"deepnorm knows constants for stacks alone and for one encoder with one decoder, found the encoders "
            f"{encoders} and the decoders {decoders}; apply it to the parts that train together"
        )
    own, other = deepnorm_constants(num_layers(found[encoders[0]]), num_layers(found[decoders[0]]))
    return {encoders[0]: own, decoders[0]: other}


def _starts(branch: Branch, beta: float, start: str) -> list[Start]:
    small = [branch.output, *([branch.value] if branch.value is not None else branch.inputs)]
    if start == "keep":
        return []
    if start == "scale":
        return [_start(matrix, times(beta)) for matrix in small]
    plain = [matrix for matrix in branch.inputs if matrix not in small]
    drawn = [_start(m, xavier_normal(beta)) for m in small]
    drawn += [_start(m, xavier_normal()) for m in plain]
    biases = {(id(m.module), m.bias): m for m in (*small, *plain) if m.bias is not None}
    return drawn + [
        Start(m.module, m.bias, getattr(m.module, m.bias), nn.init.zeros_) for m in biases.values() if m.bias
    ]


def _start(matrix: Matrix, write: Write) -> Start:
    return Start(matrix.module, matrix.weight, matrix.view(), write)
