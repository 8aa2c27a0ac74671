"""Starting values of the maps that end residual branches, divided by the square root of depth.

Radford et al. 2019, GPT-2, section 2.3: 1/sqrt(number of branches), so that the stream's variance does not grow with depth
at the start. By layer, 1/sqrt(2 (layer + 1)), as in OLMo-core's `llama_depth`.

Not for models whose start has it already (Hugging Face's GPT-2, our decoder), nor for pretrained ones: it changes outputs.
"""

import math
from contextlib import ExitStack
from typing import Literal

from torch import nn

from tameformer.patch.adapters import num_branches, stacks
from tameformer.patch.handle import PatchHandle
from tameformer.patch.select import Selector
from tameformer.stabilizers.branch_scale import check_plain, chosen_branches
from tameformer.stabilizers.starting_values import Start, keep_starts, times, write_starts


def depth_scaled_init(
    model: nn.Module, *, by: Literal["stack", "layer"] = "stack", where: Selector | None = None
) -> PatchHandle:
    """Divide the last weight of each residual branch by the square root of depth, once and in place; biases stay.

    Args:
        model: A fresh model with layers that we know.
        by: "stack" takes the number of branches in the stack for depth, "layer" twice the number of layers so far.
        where: Takes branches by the name and module of the linear map that ends them; None takes all.

    Raises:
        PatchError: The model has no such branch, the method is on it already, or another patch computes the weights.
        ValueError: `by` is something else.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        >>> before = model.layers[0].linear2.weight.detach().clone()
        >>> handle = depth_scaled_init(model)
        >>> bool((model.layers[0].linear2.weight == before / 2).all())
        True
    """
    if by not in ("stack", "layer"):
        raise ValueError(f"expected by to be 'stack' or 'layer', got {by!r}")
    found = chosen_branches(model, where)
    check_plain(found, "depth_scaled_init")
    starts = []
    for stack in stacks(found).values():
        layers = list(dict.fromkeys(branch.block for branch in stack))
        for branch in stack:
            depth = num_branches(stack) if by == "stack" else 2 * (layers.index(branch.block) + 1)
            output = branch.output
            starts.append(Start(output.module, output.weight, output.view(), times(1 / math.sqrt(depth))))
    with ExitStack() as undo:
        write_starts(undo, starts, "depth_scaled_init")
        kept = undo.pop_all()
    return PatchHandle(
        "depth_scaled_init",
        [branch.output.name for branch in found],
        kept,
        bake=lambda: keep_starts(starts, "depth_scaled_init"),
        settings={"by": by},
    )
