"""A factor on the shortcut of Post-norm branches: norm(w * x + f(x)) where the model computes norm(x + f(x)).

Two forms, for no `forward` is replaced:

- A trained factor w (dim,): what the norm is about to read, s = x + f(x), becomes s + (w - 1) x in a hook; x was noted where it
  passed by. The factor is a parameter of the norm.
- A constant w > 0: norms do not see a common factor, so norm(w x + f(x)) is norm(x + f(x) / w) with the norm's epsilon over
  w^2, and the branch's last weight and bias are divided by w. No hook; torch's fused paths stay.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tameformer.errors import PatchError
from tameformer.patch.adapters import Branch, Tap
from tameformer.patch.parametrized import chain_of
from tameformer.shapes import Float
from tameformer.stabilizers.branch_norms import without_nested_tensors
from tameformer.stabilizers.branch_scale import ScaledBranches, weight_owners

SCALE = "shortcut_scale"
"""The parameter's name in its norm."""


def scaled_sum(
    total: Float[Tensor, "*batch dim"], residual: Float[Tensor, "*batch dim"], scale: Float[Tensor, " dim"]
) -> Float[Tensor, "*batch dim"]:
    """The residual times scale plus the branch, from total = residual + branch.

    Example:
        >>> scaled_sum(torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([10.0]))
        tensor([23.])
    """
    return torch.addcmul(total, residual.to(total.dtype), (scale - 1).to(total.dtype))


class Stream:
    """The residual stream inside one layer, from where it passes by to the sum; empty otherwise."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        """The stream, once."""
        value, self.value = self.value, None
        if value is None:
            raise PatchError("the residual stream did not pass where the layer's class lets it pass; was it changed?")
        return value


# Hooks are objects, not closures, so that a copy of the model has its own.


class _Enter:
    def __init__(self, stream: Stream, tap: Tap):
        self.stream, self.position, self.keyword = stream, tap.position, tap.keyword

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.stream.value = args[self.position] if len(args) > self.position else kwargs[self.keyword]


class _Leave:
    def __init__(self, stream: Stream):
        self.stream = stream

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stream.value = output


class _Forget:
    def __init__(self, stream: Stream):
        self.stream = stream

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stream.value = None


class _AddShortcut:
    def __init__(self, stream: Stream):
        self.stream = stream

    def __call__(self, module: nn.Module, args: Any) -> Any:
        return (scaled_sum(args[0], self.stream.take(), getattr(module, SCALE)), *args[1:])


def hook_sums(
    undo: ExitStack, model: nn.Module, found: Sequence[Branch], make: Callable[[Branch, Stream], Callable[..., Any]]
) -> None:
    """Put a hook before each branch's norm, which finds the residual in the stream of its layer.

    Args:
        undo: Where the way back is put.
        model: The model, unwrapped.
        found: Post-norm branches.
        make: From a branch and its layer's stream to the norm's pre-hook.
    """
    without_nested_tensors(undo, model)
    streams: dict[str, Stream] = {}
    for branch in found:
        if branch.block not in streams:
            stream = streams[branch.block] = Stream()
            block = model.get_submodule(branch.block)
            # Nothing stays alive behind a layer, also after an exception, as checkpointing ends its second forward by one.
            undo.callback(block.register_forward_hook(_Forget(stream), always_call=True).remove)
        stream = streams[branch.block]
        for tap in branch.taps:
            if tap.leaves:
                undo.callback(tap.module.register_forward_hook(_Leave(stream)).remove)
            else:
                undo.callback(tap.module.register_forward_pre_hook(_Enter(stream, tap), with_kwargs=True).remove)
        undo.callback(norm_of(branch).register_forward_pre_hook(make(branch, stream)).remove)


def train_shortcuts(undo: ExitStack, model: nn.Module, scales: Sequence[tuple[Branch, nn.Parameter]]) -> None:
    """Put trained factors (dim,) on the shortcuts."""
    for branch, scale in scales:
        norm = norm_of(branch)
        norm.register_parameter(SCALE, scale)
        undo.callback(norm._parameters.pop, SCALE)
    hook_sums(undo, model, [branch for branch, _ in scales], lambda _, stream: _AddShortcut(stream))


def fix_shortcut(undo: ExitStack, scaled: ScaledBranches, branch: Branch, scale: float) -> None:
    """Put a constant factor above 0 on the shortcut: the branch over it, and the norm's epsilon over its square."""
    weight = getattr(branch.output.module, branch.output.weight)
    scaled.scale(branch, torch.tensor(1 / scale, dtype=weight.dtype, device=weight.device))
    norm = norm_of(branch)
    undo.callback(setattr, norm, "eps", norm.eps)
    _shrink_epsilon(norm, scale)


def _shrink_epsilon(norm: Any, scale: float) -> None:
    epsilon = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
    norm.eps = epsilon / scale**2


def norm_of(branch: Branch) -> Any:
    """The norm behind the branch's sum."""
    assert branch.norm is not None
    return branch.norm.module


def check_post_norm(found: Sequence[Branch], method: str) -> None:
    """Refuse branches without a norm behind their sum, and shortcuts that have a factor.

    Raises:
        PatchError: There is one.
    """
    for branch in found:
        if branch.placement != "post":
            raise PatchError(
                f"{method} needs Post-norm layers, but {branch.name} is {branch.placement}-norm, where a scaled shortcut "
                f"grows the stream without bound; build the model with its norms behind the sums"
            )
        if not hasattr(norm_of(branch), "eps"):
            raise PatchError(f"{method} needs a norm behind {branch.name}, found {type(norm_of(branch)).__name__}")
        chain = chain_of(branch.output.module, branch.output.weight) or ()
        others = [getattr(part, "method", None) for part in chain]
        if SCALE in norm_of(branch)._parameters or {"admin", "deepnorm"} & set(others):
            raise PatchError(f"{method}: the shortcut of {branch.name} is scaled already; remove or bake that first")


def plan_fold(
    model: nn.Module, stack: Sequence[Branch], scales: Sequence[Tensor | float], method: str
) -> Callable[[], None]:
    """How one stack's factors go into plain weights; nothing is changed before the answer is called.

    With x = LN(...) = g n + c before branch i, scaling g and c by w gives w x; the maps that read x are divided by w in turn.
    So a factor w (dim,) moves into the norm before and the branch's inputs. Where that cannot be, a constant one moves into
    the branch's output and the epsilon of the norm behind.

    Raises:
        PatchError: A factor has no place; it says which and why.
    """
    owners = weight_owners(model)
    steps: list[Callable[[], object]] = []
    for index, (branch, given) in enumerate(zip(stack, scales, strict=True)):
        scale = _as_number(given)
        if not isinstance(scale, Tensor) and scale == 1:
            continue
        reason = _why_not_inputs(model, stack, index, scale, owners)
        if reason is None:
            steps.append(_into_inputs(norm_of(stack[index - 1]), branch, scale))
        elif isinstance(scale, Tensor):
            raise PatchError(f"{method} cannot be folded at {branch.name}: {reason}; keep the patch, or remove it")
        elif scale <= 0:
            raise PatchError(f"{method} cannot be folded at {branch.name}: its factor {scale} is not above 0")
        elif any(owners[id(p)] > 1 for p in _plain(branch.output.module, branch.output.weight, branch.output.bias)):
            raise PatchError(f"{method} cannot be folded at {branch.name}: its last weight serves at other places too")
        else:
            steps.append(_into_output(branch, scale))

    def fold() -> None:
        for step in steps:
            step()

    return fold


def _as_number(scale: Tensor | float) -> Tensor | float:
    """A copy of a factor by channel, or the number that all its channels are."""
    if not isinstance(scale, Tensor):
        return scale
    values = scale.detach().clone()
    return float(values[0]) if bool((values == values[0]).all()) else values


def _why_not_inputs(
    model: nn.Module, stack: Sequence[Branch], index: int, scale: Tensor | float, owners: Mapping[int, int]
) -> str | None:
    """Why a factor cannot move into the norm before the branch and what reads it; None where it can."""
    branch = stack[index]
    if index == 0:
        return "its factor was trained by channel, and the stream comes from embeddings, which other readers have too"
    before = norm_of(stack[index - 1])
    if branch.uses > 1:
        return "the layer runs several times"
    if bool(torch.as_tensor(scale == 0).any()):
        return "its factor is 0 at a channel"
    if before.weight is None:
        return f"the norm {stack[index - 1].name} has no weight to take it"
    if any(getattr(module, "layerdrop", 0) for module in model.modules()):
        return "layers are skipped while training (layerdrop), so that different ones read one norm"
    if getattr(getattr(model, "config", None), "output_hidden_states", False):
        return "the model returns the stream between its layers (output_hidden_states)"
    for matrix in branch.inputs:
        if chain_of(matrix.module, matrix.weight) is not None:
            return f"{matrix.name}.{matrix.weight} is computed by another patch, which must be baked first"
    readers = [p for matrix in branch.inputs for p in _plain(matrix.module, matrix.weight)]
    if any(owners[id(p)] > 1 for p in (*readers, *_plain(before, "weight", "bias"))):
        return "weights that would take it serve at other places too"
    return None


def _plain(module: nn.Module, *names: str | None) -> list[nn.Parameter]:
    """The stored parameters behind these names."""
    chains = [(name, chain_of(module, name)) for name in names if name]
    found = [module._parameters.get(name) if chain is None else chain.original for name, chain in chains]
    return [p for p in found if isinstance(p, nn.Parameter)]


def _into_inputs(before: Any, branch: Branch, scale: Tensor | float) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        before.weight.mul_(scale)
        if getattr(before, "bias", None) is not None:
            before.bias.mul_(scale)
        for matrix in branch.inputs:
            matrix.view().div_(scale)

    return step


def _into_output(branch: Branch, scale: float) -> Callable[[], None]:
    @torch.no_grad()
    def step() -> None:
        for parameter in _plain(branch.output.module, branch.output.weight, branch.output.bias):
            parameter.div_(scale)
        _shrink_epsilon(norm_of(branch), scale)

    return step
