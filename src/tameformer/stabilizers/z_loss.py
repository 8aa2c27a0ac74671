"""Output logits that stay near where their softmax is exact: the z-loss, beside each cross-entropy of the training.

Chowdhery et al. 2022, "PaLM", arXiv:2204.02311, section 5; for what it prevents see Wortsman et al. 2023, arXiv:2309.14322.

Models of Hugging Face compute their loss themselves, with their own shift of the labels, mask and divisor. So the term is
added where all of that is known: at the call of `F.cross_entropy`, seen by a `TorchFunctionMode`, with that call's arguments.
Class weights and the divisor are those of the call; label smoothing does not touch the term, which depends on no label.
Differs from the paper: nothing. Not for: losses in fused kernels, which never have the logits, or inside activation
checkpointing, which computes them again after the pass; both end in an error.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import FrameType
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn._reduction import get_enum, legacy_get_string
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from tameformer.errors import PatchError
from tameformer.nn.z_loss import log_partition_penalty
from tameformer.patch.handle import PatchHandle
from tameformer.patch.unwrapped import unwrapped

Arguments = ParamSpec("Arguments")


def z_loss(model: nn.Module, *, coefficient: float = 1e-4, vocab_size: int | None = None) -> PatchHandle:
    """Add the term to each cross-entropy that the model computes in its forward pass while it trains; outputs stay the same.

    For a model that returns its loss, as those of Hugging Face do when they get labels; for a loss outside the model there is
    `with_z_loss`. In evaluation mode nothing happens. Baking takes it off, for it changes no weight.

    Args:
        model: May be compiled or distributed already.
        coefficient: Factor on (ln Z)^2.
        vocab_size: Columns of the logits from this one on are padding; None is all columns.

    Raises:
        PatchError: It is on the model already. Later, from a training pass with gradients: the model called no cross-entropy.
        ValueError: A negative coefficient, or a vocabulary without tokens.

    Example:
        >>> class Classifier(nn.Linear):
        ...     def forward(self, x, labels):
        ...         return torch.nn.functional.cross_entropy(super().forward(x), labels)
        >>> model, batch = Classifier(4, 8), (torch.zeros(2, 4), torch.tensor([1, 2]))
        >>> before = model(*batch)
        >>> handle = z_loss(model, coefficient=1.0)
        >>> bool(model(*batch) > before + 1), bool(model.eval()(*batch) == before)
        (True, True)
    """
    _check(coefficient, vocab_size)
    model = unwrapped(model)
    if any(isinstance(getattr(hook, "__self__", None), _Passes) for hook in model._forward_pre_hooks.values()):
        raise PatchError(f"z_loss is on {type(model).__name__} already; remove it first")
    passes = _Passes(coefficient, vocab_size)
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(passes.enter).remove)
        undo.callback(model.register_forward_hook(passes.leave, always_call=True).remove)
        kept = undo.pop_all()
    settings = {"coefficient": coefficient, "vocab_size": vocab_size}
    return PatchHandle("z_loss", [""], kept, bake=kept.close, settings=settings)


def with_z_loss(
    loss: Callable[Arguments, Tensor], *, coefficient: float = 1e-4, vocab_size: int | None = None
) -> Callable[Arguments, Tensor]:
    """The loss function with the term added to each cross-entropy that it calls; use it in training only.

    Args:
        loss: Computes a loss by `F.cross_entropy` or `nn.CrossEntropyLoss`, from any arguments.
        coefficient: Factor on (ln Z)^2.
        vocab_size: Columns of the logits from this one on are padding; None is all columns.

    Raises:
        PatchError: When it is called: the loss called no cross-entropy.
        ValueError: A negative coefficient, or a vocabulary without tokens.

    Example:
        >>> loss = with_z_loss(torch.nn.functional.cross_entropy, coefficient=1.0)
        >>> round(float(loss(torch.zeros(1, 8), torch.tensor([3]))), 4)  # ln 8 + (ln 8)^2
        6.4035
    """
    _check(coefficient, vocab_size)

    def penalized(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        with _Adding(coefficient, vocab_size) as adding:
            value = loss(*args, **kwargs)
        if not adding.seen:
            raise PatchError(
                f"z_loss saw no cross-entropy in {getattr(loss, '__name__', 'the loss')}; add "
                f"tameformer.nn.z_loss.log_partition_penalty to it by hand"
            )
        return value

    return penalized


class _Adding(TorchFunctionMode):
    """Sees cross-entropies while it is entered, and adds the term to each."""

    def __init__(self, coefficient: float, vocab_size: int | None):
        super().__init__()
        self.coefficient, self.vocab_size = coefficient, vocab_size
        self.seen, self.with_gradients = False, torch.is_grad_enabled()

    def applies(self) -> bool:
        """Whether a call that is seen now is part of what is trained, not a metric without gradients."""
        return torch.is_grad_enabled() or not self.with_gradients

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.cross_entropy or not self.applies():
            return func(*args, **(kwargs or {}))
        self.seen = True
        return self._cross_entropy(*args, **(kwargs or {}))

    def _cross_entropy(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Any = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """`F.cross_entropy` and the term. A call of it would come here again in graphs that run plainly (backend "eager")."""
        if size_average is not None or reduce is not None:
            reduction = legacy_get_string(size_average, reduce)
        loss = torch.ops.aten.cross_entropy_loss(
            input, target, weight, get_enum(reduction), ignore_index, label_smoothing
        )
        is_probability = target.shape == input.shape
        term = log_partition_penalty(
            _classes_last(input),
            _classes_last(target) if is_probability else target,
            coefficient=self.coefficient,
            vocab_size=self.vocab_size,
            ignore_index=ignore_index,
            weight=weight,
            reduction=reduction,
        )
        return loss + term.to(loss.dtype)


class _Pass(_Adding):
    """One forward pass of a model.

    A module's hooks are not called after Ctrl-C, so that the mode outlives its pass until the next one. Meanwhile the call that
    entered it is not among those that are running, and it does nothing.
    """

    def __init__(self, coefficient: float, vocab_size: int | None):
        super().__init__(coefficient, vocab_size)
        self.caller = next((frame for frame in _frames() if frame.f_code is nn.Module._call_impl.__code__), None)

    def applies(self) -> bool:
        """Whether, besides, the pass is still running."""
        return super().applies() and self.is_running()

    def is_running(self) -> bool:
        """Whether the call that entered it is."""
        return self.caller is None or torch.compiler.is_compiling() or any(frame is self.caller for frame in _frames())


def _frames() -> Iterator[FrameType]:
    """The calls that are running, innermost first; none while a compiler traces."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


class _Passes:
    """The hooks on a model; a copy of the model has its own."""

    def __init__(self, coefficient: float, vocab_size: int | None):
        self.coefficient, self.vocab_size = coefficient, vocab_size
        self.running: list[_Pass] = []

    def __deepcopy__(self, memo: Any) -> "_Passes":
        return _Passes(self.coefficient, self.vocab_size)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Begin to look for cross-entropies."""
        while self.running and not self.running[-1].is_running() and _get_current_function_mode() is self.running[-1]:
            self.running.pop().__exit__(None, None, None)
        if module.training:
            self.running.append(_Pass(self.coefficient, self.vocab_size))
            self.running[-1].__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Look no further; the output is None after an exception."""
        if not self.running:
            return
        running = self.running.pop()
        running.__exit__(None, None, None)
        if not running.seen and output is not None and running.with_gradients:
            raise PatchError(
                f"z_loss saw no cross-entropy in a training pass of {type(module).__name__}: give it the labels, so that it "
                f"computes its loss by F.cross_entropy; or, where the loss is computed outside of the model, remove this and "
                f"wrap that loss in tameformer.with_z_loss"
            )


def _classes_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1) if tensor.ndim > 1 else tensor


def _check(coefficient: float, vocab_size: int | None) -> None:
    if not coefficient >= 0:
        raise ValueError(f"expected a coefficient of at least 0, got {coefficient}")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"expected a vocab_size of at least 1, got {vocab_size}")
