"""Attention heads with a gate each: how much each matters, and taking the rest out exactly.

Michel et al. 2019, "Are Sixteen Heads Really Better than One?", arXiv:1905.10650. A gate multiplies what a head gives before
the output projection. The importance of a head is the mean over examples of |d loss / d gate| at gates of 1 (equation 2),
and a head whose gate is 0 can be cut out of the weights without a change of the output.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Attention, Branch, Matrix, branches
from tameformer.patch.handle import PatchHandle
from tameformer.shapes import Float

Loss = Callable[[nn.Module, Any], Tensor]
_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_KEY_COUNTS = ("num_kv_heads", "num_key_value_heads")


def gate_heads(model: nn.Module) -> PatchHandle:
    """Give every attention head of the model a gate, 1 at first; nothing changes until the gates do.

    `new_parameters` holds one vector of gates for each attention in `names`, to be trained or set. `bake` multiplies them into
    the output projections.

    Raises:
        PatchError: No layer is known, or a layer's output projection is never called (`torch.nn.MultiheadAttention`).

    Example:
        >>> from tameformer.models import DecoderConfig, decoder
        >>> model = decoder(DecoderConfig(dim=16, num_heads=4, num_layers=1), vocab_size=65)
        >>> with gate_heads(model) as handle:
        ...     handle.names, handle.new_parameters[0].shape
        (('stack.layers.0.attention.branch',), torch.Size([4]))
    """
    with ExitStack() as undo:
        found, gates = _attentions(model), []
        for attention, out in found:
            weight = out.view()
            gates.append(nn.Parameter(torch.ones(attention.num_heads, dtype=weight.dtype, device=weight.device)))
            undo.callback(out.module.register_forward_pre_hook(partial(_gated, gate=gates[-1])).remove)
        taken = undo.pop_all()

    @torch.no_grad()
    def bake() -> None:
        for (_, out), gate in zip(found, gates, strict=True):
            out.view().mul_(gate.repeat_interleave(out.view().shape[1] // len(gate)))
        taken.close()

    names = [attention.name for attention, _ in found]
    return PatchHandle("gate_heads", names, taken, bake=bake, new_parameters=gates)


def head_importance(model: nn.Module, batches: Iterable[Any], loss: Loss) -> dict[str, Float[Tensor, " heads"]]:
    """How much the loss would change with each head's gate, for each attention, of length 1 (L2) in each.

    The model is not changed, and its gradients are not touched; what mode it is in is the caller's choice.

    Args:
        model: A model with layers that we know.
        batches: What `loss` takes; each may have another number of examples.
        loss: From model and batch to a scalar, a mean over the examples, which come first in what goes through the layers.

    Raises:
        PatchError: As `gate_heads`.
        ValueError: There is no batch, or the loss does not depend on a layer's heads.
    """
    found, sums, examples = _attentions(model), {}, 0
    for batch in batches:
        gates: dict[str, list[Tensor]] = {attention.name: [] for attention, _ in found}
        with ExitStack() as hooks:
            for attention, out in found:
                opened = partial(_opened, heads=attention.num_heads, gates=gates[attention.name])
                hooks.callback(out.module.register_forward_pre_hook(opened).remove)
            with torch.enable_grad():
                scalar = loss(model, batch)
        silent = [name for name, calls in gates.items() if not calls]
        if silent:
            raise ValueError(f"expected the loss to call every layer, but {silent[0]} was not called; prune it by hand")
        flat = [gate for calls in gates.values() for gate in calls]
        slopes = iter(torch.autograd.grad(scalar, flat))
        size = len(flat[0])
        examples += size
        for name, calls in gates.items():
            slope = sum((next(slopes) for _ in calls), torch.zeros(()))  # a layer that runs twice has one gate
            sums[name] = sums.get(name, 0) + slope.abs().sum(0) * size  # the loss is a mean over `size`
    if not examples:
        raise ValueError("expected at least one batch, got none")
    return {name: nn.functional.normalize(total / examples, dim=0) for name, total in sums.items()}


def least_important(importance: Mapping[str, Tensor], count: int) -> dict[str, list[int]]:
    """The `count` heads of smallest importance over all layers, of which each keeps at least one.

    Raises:
        ValueError: There are not that many heads to take.

    Example:
        >>> least_important({"a": torch.tensor([0.1, 0.9]), "b": torch.tensor([0.3, 0.2])}, 2)
        {'a': [0], 'b': [1]}
    """
    order = sorted(
        (float(value), name, head) for name, values in importance.items() for head, value in enumerate(values)
    )
    chosen: dict[str, list[int]] = {}
    for _, name, head in order:
        if count and len(chosen.get(name, ())) + 1 < len(importance[name]):
            chosen.setdefault(name, []).append(head)
            count -= 1
    if count:
        raise ValueError(f"expected to keep a head in each layer, but {count} more were to be pruned; prune fewer")
    return {name: sorted(chosen[name]) for name in importance if name in chosen}


def prune_heads(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> PatchHandle:
    """Cut heads out: their rows of queries, keys and values, and their columns of the output projection.

    The outputs are those of the model with these heads' gates at 0, and the weights are smaller, so prune before the optimizer
    is built. Our models, and those of Hugging Face whose projections are linear layers of their own: BERT, DistilBERT, ViT,
    Llama, BART and their relatives. A head of keys that serves several of queries goes with all of them or not at all. A fresh
    model takes the pruned weights only after the same heads were pruned there; the handle's `settings` name them.

    Args:
        model: What to prune.
        heads: By the name of an attention, as `head_importance` has them, the numbers of its heads.

    Raises:
        PatchError: A name is not there, its projections are fused or hold something for each head besides, or the heads are
            not those of whole groups, or all of a layer.

    Example:
        >>> from tameformer.models import DecoderConfig, decoder
        >>> model = decoder(DecoderConfig(dim=16, num_heads=4, num_layers=1), vocab_size=65)
        >>> handle = prune_heads(model, {"stack.layers.0.attention.branch": [0, 2]})
        >>> model.stack.layers[0].attention.branch.query
        Linear(in_features=16, out_features=8, bias=True)
    """
    found = {attention.name: (attention, out) for attention, out in _attentions(model)}
    for name in heads:
        if name not in found:
            raise PatchError(f"expected the name of an attention, got {name}; there are {', '.join(found)}")
    with ExitStack() as undo:
        for name, numbers in heads.items():
            attention, out = found[name]
            kept, kept_keys = _kept(attention, numbers)
            _check_separate(attention, out)
            total, total_keys = (
                attention.num_heads,
                attention.num_kv_heads,
            )  # read off the weights, so before they are cut
            for matrix, axis, members, count in (
                (attention.query, 0, kept, total),
                (attention.key, 0, kept_keys, total_keys),
                (attention.value, 0, kept_keys, total_keys),
                (out, 1, kept, total),
            ):
                _keep(undo, matrix, axis, _entries(members, matrix.view().shape[axis] // count))
            for words, members in ((_COUNTS, kept), (_KEY_COUNTS, kept_keys)):
                for word in words:
                    if isinstance(getattr(attention.module, word, None), int):
                        undo.callback(setattr, attention.module, word, getattr(attention.module, word))
                        setattr(attention.module, word, len(members))
        settings = {"heads": {name: sorted(set(numbers)) for name, numbers in heads.items()}}
        return PatchHandle("prune_heads", list(heads), undo.pop_all(), bake=lambda: None, settings=settings)


def _attentions(model: nn.Module) -> list[tuple[Attention, Matrix]]:
    """Every attention, and the linear map that its heads go into."""
    return [(branch.attention, _reader(branch, branch.attention)) for branch in branches(model) if branch.attention]


def _reader(branch: Branch, attention: Attention) -> Matrix:
    if isinstance(attention.module, nn.MultiheadAttention):
        raise PatchError(
            f"{branch.name} is a MultiheadAttention, which never calls its output projection, so that its heads have no place "
            "for a gate; take tameformer.models or a Hugging Face model"
        )
    if branch.placement != "peri":
        return branch.output
    return Matrix(f"{attention.name}.out", attention.module.get_submodule("out"))


def _gated(module: nn.Module, args: tuple[Any, ...], *, gate: Tensor) -> tuple[Any, ...]:
    mixed = args[0].unflatten(-1, (len(gate), -1)) * gate.to(args[0].dtype)[:, None]
    return mixed.flatten(-2), *args[1:]


def _opened(module: nn.Module, args: tuple[Any, ...], *, heads: int, gates: list[Tensor]) -> tuple[Any, ...]:
    """Multiply by a gate for each example and head, and keep it."""
    gate = args[0].new_ones(len(args[0]), heads).requires_grad_()
    gates.append(gate)
    mixed = args[0].unflatten(-1, (heads, -1)) * gate[:, None, :, None]
    return mixed.flatten(-2), *args[1:]


def _kept(attention: Attention, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
    """The heads of queries and those of keys that stay."""
    total, served = attention.num_heads, attention.num_heads // attention.num_kv_heads
    if not set(numbers) <= set(range(total)):
        raise PatchError(f"{attention.name} has the heads 0..{total - 1}, got {sorted(numbers)}")
    kept = [head for head in range(total) if head not in set(numbers)]
    keys = sorted({head // served for head in kept})
    if not kept:
        raise PatchError(f"{attention.name} would have no head left; leave one, or take the layer out")
    if len(keys) * served != len(kept):
        raise PatchError(
            f"{attention.name} has keys that serve {served} heads each, which can be pruned together only, "
            f"got {sorted(numbers)}"
        )
    return kept, keys


def _check_separate(attention: Attention, out: Matrix) -> None:
    for matrix in (attention.query, attention.key, attention.value, out):
        if matrix.start is not None or matrix.is_transposed or type(matrix.module) is not nn.Linear:
            raise PatchError(
                f"{matrix.name} is no linear layer of its own ({type(matrix.module).__name__}, fused or patched), whose heads "
                "cannot be cut out; bake what was patched, or keep a gate of 0 with gate_heads"
            )
    maps = {id(matrix.module) for matrix in (attention.query, attention.key, attention.value, out)}
    for name, child in attention.module.named_children():
        tensors = [] if id(child) in maps else [*child.parameters(), *child.buffers()]
        if any(tensor.shape[:1] == (attention.num_heads,) for tensor in tensors):
            raise PatchError(f"{attention.name}.{name} holds something for each head, which pruning does not cut")
    if getattr(attention.module, "relative_attention_bias", None) is not None or hasattr(
        attention.module, "has_relative_attention_bias"
    ):
        raise PatchError(
            f"{attention.name} adds a bias for each head, which all layers share; keep a gate of 0 with gate_heads"
        )


def _entries(heads: Sequence[int], width: int) -> Tensor:
    return (torch.tensor(heads)[:, None] * width + torch.arange(width)).flatten()


def _keep(undo: ExitStack, matrix: Matrix, axis: int, entries: Tensor) -> None:
    """Leave these outputs (axis 0) or inputs (axis 1) of a linear layer."""
    module, attribute = matrix.module, ("out_features", "in_features")[axis]
    words = ("weight", "bias") if axis == 0 else ("weight",)
    for word in words:
        old = getattr(module, word)
        if old is not None:
            new = nn.Parameter(old.detach().index_select(axis, entries.to(old.device)), requires_grad=old.requires_grad)
            undo.callback(setattr, module, word, old)
            setattr(module, word, new)
    undo.callback(setattr, module, attribute, getattr(module, attribute))
    setattr(module, attribute, len(entries))
