"""How large branches are beside their shortcuts, measured through all layers in one forward pass a batch.

The recursion of the code released with Liu et al. 2020, arXiv:2004.08249 (not the paper's formula, which lacks the leading 1):
the first factor is 1, and the next one's square is Var(w x) + Var(f(x)), with later layers seeing the earlier ones scaled.

Differs from it: embeddings of a variance below 1 count as 1. By theirs, starting values such as a deviation of 0.02 would give
factors far below 1, which shrink the shortcut that they are meant to protect; their own embeddings have a variance above 1.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from tameformer.errors import NonFiniteError, PatchError
from tameformer.patch.adapters import Branch, stacks
from tameformer.shapes import Bool
from tameformer.stabilizers.shortcut_scale import Stream, hook_sums, scaled_sum

Masks = Mapping[str, Bool[Tensor, "batch seq"]]
"""True at real tokens, for the "encoder" and the "decoder" side; a side that is missing has no padding."""


def admin_scales(variances: Sequence[float]) -> list[float]:
    """The factors of a stack whose branches have these output variances, where x has variance 1: sqrt(1 + sum before).

    Example:
        >>> admin_scales([3.0, 5.0, 7.0])
        [1.0, 2.0, 3.0]
    """
    return [(1 + sum(variances[:index])) ** 0.5 for index in range(len(variances))]


def real_tokens(batch: Any) -> Masks:
    """The masks that a mapping holds under the names that models of Hugging Face, torch and ours use; else none.

    Example:
        >>> real_tokens({"src_key_padding_mask": torch.tensor([[False, True]])})
        {'encoder': tensor([[ True, False]])}
    """
    if not isinstance(batch, Mapping):
        return {}
    found = {}
    for key, side, is_padding in (
        ("attention_mask", "encoder", False),
        ("real", "encoder", False),
        ("source_mask", "encoder", False),
        ("src_key_padding_mask", "encoder", True),
        ("decoder_attention_mask", "decoder", False),
        ("tgt_key_padding_mask", "decoder", True),
    ):
        mask = batch.get(key)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            found[side] = mask == 0 if is_padding and mask.dtype != torch.bool else mask.bool() != is_padding
    return found


def call_with(model: nn.Module, batch: Any) -> Any:
    """Calls the model: a mapping becomes keywords, a tuple or list positional arguments, anything else the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


class _Moments:
    """Count, sum and sum of squares of a branch's parts, (2, 3): of the scaled shortcut and of the branch; over batches."""

    def __init__(self, found: Sequence[Branch]):
        self.firsts = {stack[0].name for stack in stacks(list(found)).values()}
        self.sums = {branch.name: torch.zeros(2, 3, dtype=torch.float64) for branch in found}
        self.seen: list[tuple[str, Tensor]] = []

    def add(self, name: str, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Note two tensors; returns the sum of their variances, on the device."""
        variances, means = zip(*(torch.var_mean(part, correction=0) for part in (shortcut, branch)), strict=True)
        count = torch.full_like(means[0], shortcut.numel())
        self.seen.append(
            (name, torch.stack([torch.stack([count, m, v]) for m, v in zip(means, variances, strict=True)]))
        )
        return self._shortcut(name, variances[0]) + variances[1]

    def end_pass(self) -> None:
        """Move the pass's numbers to the host, all at once."""
        if self.seen:
            values = torch.stack([value for _, value in self.seen]).cpu().double()
            count, mean, variance = values.unbind(-1)
            sums = torch.stack([count, count * mean, count * (variance + mean**2)], -1)
            for (name, _), one in zip(self.seen, sums, strict=True):
                self.sums[name] += one
        self.seen.clear()

    def share(self, device: torch.device) -> None:
        """Add up what all processes saw."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            together = torch.stack(list(self.sums.values())).to(device)
            torch.distributed.all_reduce(together)
            self.sums = dict(zip(self.sums, together.cpu(), strict=True))

    def variance(self, name: str) -> float:
        """Variance of the scaled shortcut plus that of the branch, over everything seen."""
        count, total, squares = self.sums[name].unbind(-1)
        if not bool((count > 0).all()):
            raise PatchError(f"the batches never ran the branch {name}; give batches that use the whole model")
        variances = squares / count - (total / count) ** 2
        variance = float(self._shortcut(name, variances[0]) + variances[1])
        if variance != variance or variance == float("inf"):
            raise NonFiniteError(f"the variance at branch {name} is {variance}; profile in float32 on clean batches")
        return variance

    def _shortcut(self, name: str, variance: Tensor) -> Tensor:
        """What a normalized stream would have, where embeddings have less."""
        return variance.clamp(min=1) if name in self.firsts else variance


class _Measure:
    """Before a norm: measure, scale the shortcut, and go on."""

    def __init__(self, branch: Branch, stream: Stream, run: "_Run"):
        self.branch, self.stream, self.run = branch, stream, run

    def __call__(self, module: nn.Module, args: Any) -> Any:
        branch, run = self.branch, self.run
        residual, result = self.stream.take(), run.results.pop(branch.name)
        if branch.name in run.passed:
            raise PatchError(
                f"the branch {branch.name} runs several times a pass; its factor would be one for all of them"
            )
        run.passed.add(branch.name)
        if not torch.allclose(args[0], residual + result, rtol=1e-2, atol=1e-3):
            raise PatchError(
                f"what {branch.name} adds to is not the residual stream as its class has it; was it changed?"
            )
        scale = run.scales[branch.stack]
        real = run.real(branch)
        shortcut, value = residual.float() * scale, result.float()
        shortcut, value = (shortcut, value) if real is None else (shortcut[real], value[real])
        run.scales[branch.stack] = run.moments.add(branch.name, shortcut, value).sqrt()
        return (scaled_sum(args[0], residual, scale.expand(residual.shape[-1])), *args[1:])


class _Run:
    """What one profile knows."""

    def __init__(self, found: Sequence[Branch]):
        self.moments = _Moments(found)
        self.decoders = {
            name for name, stack in stacks(list(found)).items() if any(b.kind == "cross_attention" for b in stack)
        }
        self.masks: Masks = {}
        self.results: dict[str, Tensor] = {}
        self.passed: set[str] = set()
        self.scales: dict[str, Tensor] = {}

    def begin_pass(self, masks: Masks, device: torch.device) -> None:
        self.masks = masks
        self.passed.clear()
        self.scales = defaultdict(lambda: torch.ones((), device=device))

    def real(self, branch: Branch) -> Tensor | None:
        mask = self.masks.get("decoder" if branch.stack in self.decoders else "encoder")
        return mask if mask is None or branch.batch_first else mask.T


@torch.no_grad()
def profile(
    model: nn.Module,
    found: Sequence[Branch],
    batches: Iterable[Any],
    *,
    call: Callable[[nn.Module, Any], Any] = call_with,
    mask: Callable[[Any], Masks] = real_tokens,
) -> dict[str, float]:
    """The factor of each branch, by its name. The model is as before afterwards.

    It is measured in evaluation mode, without dropout, so that the same batches give the same factors. The authors' code
    leaves dropout on, which makes the branches' variances larger by 1 / (1 - rate). Variances are over all real tokens and
    channels of all batches and processes.

    Raises:
        PatchError: A branch never ran, or ran several times, or is not added as its class has it.
        NonFiniteError: A variance is NaN or infinite.
        ValueError: There are no batches.
    """
    run = _Run(found)
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    num_batches = 0
    with ExitStack() as undo:
        for branch in found:
            undo.callback(branch.result.register_forward_hook(_Note(branch.name, run.results)).remove)
        hook_sums(undo, model, found, lambda branch, stream: _Measure(branch, stream, run))
        for module, mode in modes:
            undo.callback(setattr, module, "training", mode)
        model.eval()
        for batch in batches:
            run.begin_pass(mask(batch), device)
            call(model, batch)
            run.moments.end_pass()
            num_batches += 1
    if not num_batches:
        raise ValueError("expected at least one batch to profile, got none; a generator may have been used up")
    run.moments.share(device)
    return {
        branch.name: 1.0 if index == 0 else run.moments.variance(stack[index - 1].name) ** 0.5
        for stack in stacks(list(found)).values()
        for index, branch in enumerate(stack)
    }


class _Note:
    def __init__(self, name: str, results: dict[str, Tensor]):
        self.name, self.results = name, results

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.results[self.name] = output[0] if isinstance(output, tuple) else output
