"""Who is told what happens inside a model's step."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from tameformer.patch.attention_calls import AttentionCall


class Observer:
    """Told what happens in an observed step, in this order. Tensors are detached; change nothing, keep little.

    The `on_...` methods are called while the first forward pass of the step runs, without gradients and without autocast.
    """

    def on_begin(self) -> None:
        """An observed step begins: the weights are those before the update."""

    def on_attention(self, call: AttentionCall) -> None:
        """Attention was called; one layer may call more than once."""

    def on_heads(self, layer: str, output: Tensor) -> None:
        """What each head gave before the output projection, (batch, heads, query, value_dim)."""

    def on_branch(self, layer: str, residual: Tensor, branch: Tensor) -> None:
        """A branch is being added to the residual stream, both (batch, seq, dim)."""

    def on_activation(self, layer: str, output: Tensor) -> None:
        """ReLU, GELU or SiLU inside a layer gave this, (batch, seq, hidden)."""

    def on_block(self, block: str, input: Tensor, output: Tensor) -> None:
        """A layer ended, (batch, seq, dim) both."""

    def on_output(self, output: Any) -> None:
        """What the model returned."""

    def on_gradients(self) -> None:
        """The gradients of the step are complete, as the optimizer sees them, and the weights not updated yet."""

    def on_update(self) -> None:
        """The optimizer's step is done."""


def tell_apart(tell: Callable[..., None], device: torch.device, event: str, *args: Any) -> None:
    """Tell of an event on this device inside a pass: without autocast, and so that no mode looks at what observers compute."""
    with ExitStack() as inside:
        inside.enter_context(torch._C.DisableTorchFunction())
        if torch.is_autocast_enabled(device.type):
            inside.enter_context(torch.autocast(device.type, enabled=False))
        tell(event, *args)
