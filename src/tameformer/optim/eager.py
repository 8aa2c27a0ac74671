"""Optimizers as they run outside of `torch.compile`.

Torch marks the methods of its optimizers for the compiler, and the marks import the compiler when the first optimizer is made
and again in its first step: as long as importing the rest of torch (2.13). Nothing here compiles a step of an optimizer,
and a compiled model brings the compiler along by itself.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch.optim import Optimizer

Kind = TypeVar("Kind", bound=Optimizer)
_MARKED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")


def eager(optimizer: type[Kind]) -> type[Kind]:
    """The same optimizer, of the same name and with the same results, without marks for the compiler.

    Args:
        optimizer: A class of torch or derived from one of torch's.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> adamw = eager(torch.optim.AdamW)([weight], lr=0.1, fused=True)
        >>> weight.sum().backward()
        >>> adamw.step()
        >>> adamw.__class__.__name__, isinstance(adamw, torch.optim.AdamW)
        ('AdamW', True)
    """
    step: Callable[..., Any] = inspect.unwrap(optimizer.step)

    @wraps(step)
    def without_gradients(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults.get("differentiable", False)):
            return step(self, *args, **kwargs)

    methods = {name: inspect.unwrap(getattr(optimizer, name)) for name in _MARKED}
    named = {"step": without_gradients, "__doc__": optimizer.__doc__, "__module__": optimizer.__module__}
    return cast(type[Kind], type(optimizer.__name__, (optimizer,), {**methods, **named}))
