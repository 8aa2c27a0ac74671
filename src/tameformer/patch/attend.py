"""Attention of modules that we did not write, opened between its logits and its softmax.

A module's `forward` is replaced, which nothing else here does: what it calls must be seen from its first line to its last
and not a line longer, also when it ends with an exception or an interrupt, and `torch.compile` must see the same. Hooks
promise neither. `torch.nn.MultiheadAttention` projects and attends inside one function; it is written out in `multi_head`.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tameformer.errors import PatchError
from tameformer.patch.multi_head import TAPS, check_can_open, multi_head_attention
from tameformer.shapes import Float

Transform = Callable[[Tensor], Tensor]
"""From scaled dot products (..., query, key), before masks and biases, to what takes their place."""


Watcher = Callable[..., None]
"""Called before every call of attention with query and key, (..., heads, seq, head_dim), and by name mask, is_causal, scale."""


def attention_by_logits(
    query: Float[Tensor, "*batch heads query head_dim"],
    key: Float[Tensor, "*batch kv_heads key head_dim"],
    value: Float[Tensor, "*batch kv_heads key value_dim"],
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    transform: Transform | None = None,
) -> tuple[Float[Tensor, "*batch heads query value_dim"], Float[Tensor, "*batch heads query key"]]:
    """`scaled_dot_product_attention` with `transform` on the scaled dot products, and the weights after dropout.

    The logits of all pairs are in memory. The dot products are rounded as the type of `query` and `key` is, or autocast's;
    from there to the weights it is float32 or wider. A query that may attend to nothing gives zeros, as in torch's function.

    Args:
        query: What asks.
        key: Each of `kv_heads` serves `heads / kv_heads` neighbouring heads of the queries.
        value: What is mixed.
        mask: True where a query may attend to a key, or a float to be added behind `transform`; broadcasts to the weights.
        dropout: Probability of dropping a weight.
        is_causal: Query i sees the keys 0..i.
        scale: Factor on the dot products; None is 1/sqrt(head_dim).
        transform: Applied to the scaled dot products; None is nothing.

    Example:
        >>> query, key = torch.tensor([[[2.0]]]), torch.tensor([[[0.0], [5.0]]])
        >>> attention_by_logits(query, key, key, transform=lambda logits: logits.clamp(max=1.0))[1]
        tensor([[[0.2689, 0.7311]]])
    """
    if key.shape[-3] != query.shape[-3]:
        served = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(served, -3), value.repeat_interleave(served, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query * factor) @ key.transpose(-2, -1)  # scaled first: float16 overflows otherwise
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if transform is not None:
        logits = transform(logits)
    # The smallest number rather than -inf: a row of nothing else has a softmax with a gradient.
    smallest, empty = torch.finfo(logits.dtype).min, None
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(future, smallest)
    if mask is not None and mask.dtype == torch.bool:
        empty = ~mask.any(-1, keepdim=True)
        logits = logits.masked_fill(~mask, smallest)
    elif mask is not None:
        empty = (mask == -torch.inf).all(-1, keepdim=True)
        logits = (logits + mask).masked_fill(mask == -torch.inf, smallest)
    weights = logits.softmax(-1)
    if empty is not None:
        weights = weights.masked_fill(empty, 0.0)
    weights = F.dropout(weights, dropout).to(value.dtype)
    return weights @ value, weights


class OpenAttention:
    """Stands in for the `forward` of a module while one method or several work on its attention.

    An object rather than a closure, so that a copy of the model has its own.

    Attributes:
        transform: What becomes of the scaled dot products; None leaves attention to torch's kernels.
        watchers: Who is told of each call.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.transform: Transform | None = None
        self.watchers: list[Watcher] = []
        self._users = 0
        self._before = module.__dict__.get("forward")  # somebody else's

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward."""
        module = self.module
        if isinstance(module, nn.MultiheadAttention):
            return multi_head_attention(module, self, *args, **kwargs)
        seen = _SeenCalls(self.attend)
        with seen:
            output = (
                type(module).forward(module, *args, **kwargs) if self._before is None else self._before(*args, **kwargs)
            )
        if not seen.any:
            raise PatchError(
                f"{self.name} was to call scaled_dot_product_attention and did not, so that what was patched into it had "
                f"no effect; {_REMEDY}, or remove the patch"
            )
        return output

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """What stands in for `scaled_dot_product_attention`, with its arguments."""
        if self.transform is not None:
            return self.attend_with_weights(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
        self._watch(query, key, attn_mask, is_causal, scale)
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )

    def attend_with_weights(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The same with the weights, after dropout."""
        self._watch(query, key, attn_mask, is_causal, scale)
        return attention_by_logits(
            query,
            key,
            value,
            mask=attn_mask,
            dropout=dropout_p,
            is_causal=is_causal,
            scale=scale,
            transform=self.transform,
        )

    def _watch(self, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> None:
        for watcher in self.watchers:
            watcher(query, key, mask=mask, is_causal=is_causal, scale=scale)

    def _close(self) -> None:
        self._users -= 1
        if self._users:
            return
        if self.module.__dict__.get("forward") is not self:
            raise PatchError(f"the forward of {self.name} was replaced by other means since; take that back first")
        del self.module.forward
        if self._before is not None:
            self.module.forward = self._before
        for tap in TAPS:
            self.module._modules.pop(tap, None)


_REMEDY = "for a Hugging Face model call model.set_attn_implementation('sdpa')"


def open_attention(undo: ExitStack, module: nn.Module, name: str) -> OpenAttention:
    """Open a module's attention until `undo` is closed; those who ask for the same module share it, in any order.

    Raises:
        PatchError: The module is a kind of `MultiheadAttention` that cannot be opened.
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, OpenAttention):
        opened = forward
    else:
        opened = OpenAttention(module, name)
        if isinstance(module, nn.MultiheadAttention):
            check_can_open(module, name)
            for tap in TAPS:
                module.add_module(tap, nn.Identity())
            # torch.nn's layers go round the module's forward in evaluation unless something inside carries a hook.
            module.get_submodule(TAPS[0]).register_forward_pre_hook(_nothing)
        module.forward = opened
    opened._users += 1
    undo.callback(opened._close)
    return opened


def check_calls_torch(module: nn.Module, name: str, method: str) -> None:
    """Refuse a Hugging Face module that is configured to attend by other means than torch's function.

    Raises:
        PatchError: It is.
    """
    chosen = getattr(getattr(module, "config", None), "_attn_implementation", None) or "sdpa"
    if chosen != "sdpa":
        raise PatchError(
            f"{method} needs attention by scaled_dot_product_attention, but {name} is on {chosen}; {_REMEDY}"
        )


def _nothing(module: nn.Module, args: Any) -> None:
    pass


class _SeenCalls(TorchFunctionMode):
    """While it is entered, `scaled_dot_product_attention` is `attend`; one for each forward pass of a module."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend, self.any = attend, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs) if kwargs else func(*args)
        self.any = True
        return self.attend(*args, **(kwargs or {}))
