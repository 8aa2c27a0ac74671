"""One forward pass under observation: hooks tell who runs, a `TorchFunctionMode` sees which functions are called.

It works on anyone's model, because it looks at functions and at the identity of tensors, not at classes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tameformer.patch.attention_calls import READERS, AttentionCall
from tameformer.patch.observer import Observer, tell_apart
from tameformer.patch.places import Place, Places
from tameformer.patch.residual_stream import ResidualStream, stream_in, stream_out
from tameformer.patch.sites import Sites

_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_NORMS = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm}
_ACTIVATIONS = {F.relu, torch.relu, Tensor.relu, F.gelu, F.silu}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_MIXTURES = {torch.index_add, Tensor.index_add, Tensor.index_add_}
_LOOKED_AT: dict[str, tuple[tuple[str, Iterable[Any]], ...]] = {
    "on_branch": (("sum", _SUMS), ("norm", _NORMS)),
    "on_activation": (("activation", _ACTIVATIONS),),
    "on_attention": (("attention", READERS),),
    "on_heads": (("attention", READERS), ("product", _PRODUCTS), ("mixture", _MIXTURES)),
    "on_block": (),
}
"""By event, the functions that make it."""


def wanted(observers: Iterable[Observer]) -> set[str]:
    """The events of a forward pass that somebody listens to."""
    return {
        event
        for observer in observers
        for event in _LOOKED_AT
        if getattr(type(observer), event) is not getattr(Observer, event)
    }


class ForwardPass(TorchFunctionMode):
    """Sees what happens between `begin` and `end`.

    Args:
        places: Of the model that runs.
        observers: Who is told; what none of them wants is not looked at.
        tell: Called with an event's name and arguments.
        sequences: How many sequences of a batch the events of attention get; None is all.
        sites: Told which modules ran and which of them called attention; None is nobody.
    """

    def __init__(
        self,
        places: Places,
        observers: Sequence[Observer],
        tell: Callable[..., None],
        *,
        sequences: int | None,
        sites: Sites | None = None,
    ) -> None:
        super().__init__()
        self.places, self.tell, self.sequences, self.sites = places, tell, sequences, sites
        self.attention_layers: set[str] = set()
        """Layers whose attention was seen."""
        self._wanted = wanted(observers)
        self._kinds: dict[Any, str] = {
            function: kind for event in self._wanted for kind, functions in _LOOKED_AT[event] for function in functions
        }
        self._running: list[Place] = [places.root]  # innermost last; a module without a name has its caller's
        self._ran: set[nn.Module] = set()
        self._called: set[nn.Module] = set()  # attention, innermost modules
        self._finished: str | None = None  # the module that ended last, directly inside the running one
        self._stream = ResidualStream()
        self._activated: set[str] = set()
        self._weights_shape: torch.Size | None = None  # of a softmax whose product with the values is still to come
        self._mixtures_shape: tuple[int, ...] | None = None  # of nodes and heads whose mixtures are still to come
        self._handles: list[RemovableHandle] = []
        self._undo = ExitStack()

    @property
    def looks_at_attention(self) -> bool:
        """Whether anybody is told of attention."""
        return "attention" in self._kinds.values()

    def begin(self) -> None:
        """Look at as little as those who are told want: every hook and every function looked at costs microseconds."""
        with ExitStack() as undo:
            undo.callback(self._unhook)
            for place in self.places.watched:
                if place.block is not None and self._wanted:
                    self._watch_block(place, place.block)
                elif self._kinds:
                    self._watch(place)
            if self._kinds:
                undo.enter_context(self)
            self._undo = undo.pop_all()

    def end(self) -> None:
        """Leave nothing on the model, and hold none of its tensors."""
        self._undo.close()
        self._stream.clear()
        if self.sites is not None:
            self.sites.learn(self._ran, self._called)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch(self, place: Place) -> None:
        """Know when this module runs; a stateless one, without a label, runs under the name of the one that called it."""
        is_activation = type(place.module).__module__ == "transformers.activations"
        if place.label is None and not is_activation and self.sites is None:
            return  # what it calls is its caller's in any case

        def enter(module: nn.Module, args: Any) -> None:
            self._ran.add(module)
            around = self._running[-1]
            if place.label is None:
                # By itself it may stand for a site only where its place says who calls it.
                self._running.append(place._replace(label=around.label) if place.caller == around.label else around)
            else:
                self._running.append(place)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._running.pop()
            if place.label is not None:
                self._finished = place.label
            if is_activation and isinstance(output, Tensor):
                self._activation(self._layer, output)

        self._handles += place.module.register_forward_pre_hook(enter), place.module.register_forward_hook(leave)

    def _watch_block(self, place: Place, block: str) -> None:
        """Know when this layer runs, and the stream that enters and leaves it."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._ran.add(module)
            self._running.append(place)
            self._finished = None
            self._stream.enter(block, stream_in(args, kwargs))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.pop()
            self._finished = block
            before, after = stream_in(args, kwargs), stream_out(output)
            if before is not None and after is not None and before.shape == after.shape:
                self._tell("on_block", block, self._batch_first(before), self._batch_first(after))
            self._stream.leave()

        self._handles += (
            place.module.register_forward_pre_hook(enter, with_kwargs=True),
            place.module.register_forward_hook(leave, with_kwargs=True),
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self._kinds.get(func)
        if kind is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if kind == "sum":
            return self._sum(func, args, kwargs)
        if kind == "attention":
            return self._attention(func, args, kwargs)
        output = func(*args, **kwargs)
        if kind == "norm":
            self._stream.after_norm(args, output)
        elif kind == "activation":
            self._activation(self._layer, output)
        elif kind == "product" and self._weights_shape is not None and _are_weights(args[0], self._weights_shape):
            heads = output if output.dim() == 4 else output.flatten(2, 3)[:, :, : self._weights_shape[2]]
            self._weights_shape = None
            self._tell("on_heads", self._layer, heads[: self.sequences].detach())
        elif kind == "mixture" and output.dim() == 3 and output.shape[:2] == self._mixtures_shape:
            self._mixtures_shape = None
            self._tell("on_heads", self._layer, output.detach().transpose(0, 1)[None])
        return output

    @property
    def _layer(self) -> str:
        """The name under which what runs now is told."""
        label = self._running[-1].label
        assert label is not None
        return label

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Any:
        layer = self._layer
        output = func(*args, **kwargs)
        with torch.no_grad():
            call = READERS[func](layer, self.sequences, args, kwargs)
        if call is None:
            return output
        self.attention_layers.add(layer)
        self._called.add(self._running[-1].module)
        self._tell("on_attention", call)
        if call.logits is not None and call.groups is not None:
            self._mixtures_shape = (call.num_queries, call.logits.shape[1])
        elif call.logits is not None:
            self._weights_shape = args[0].shape if args else kwargs["input"].shape
        elif "on_heads" in self._wanted:
            self._tell("on_heads", layer, _heads(func, call, output, self.sequences))
        return output

    def _sum(self, func: Any, args: Any, kwargs: Any) -> Any:
        summands = self._stream.summands(args)
        if summands is None:
            return func(*args, **kwargs)
        residual, branch = summands
        name = self._stream.name_branch(self._layer, self._finished)
        self._tell("on_branch", name, self._batch_first(residual), self._batch_first(branch))
        output = func(*args, **kwargs)
        self._stream.continue_with(output)
        return output

    def _activation(self, layer: str, output: Tensor) -> None:
        if self._stream.blocks and layer not in self._activated:
            self._activated.add(layer)
            self._tell("on_activation", layer, self._batch_first(output))

    def _batch_first(self, tensor: Tensor) -> Tensor:
        """(batch, seq, dim), whichever way round the present layer works."""
        tensor = tensor.detach()
        turned = tensor.dim() == 3 and self._stream.blocks[-1] in self.places.seq_first
        return tensor.transpose(0, 1) if turned else tensor

    def _tell(self, event: str, *args: Any) -> None:
        if event not in self._wanted:
            return
        tell_apart(self.tell, args[-1].device, event, *args)


def _heads(func: Any, call: AttentionCall, output: Any, sequences: int | None) -> Tensor:
    """The heads' output; `MultiheadAttention` returns it projected, so there it is computed again."""
    if func is F.scaled_dot_product_attention:
        output = output.detach()
        output = output.unsqueeze(1) if output.dim() == 3 else output
        return output.reshape((1,) * (4 - output.dim()) + output.shape)[:sequences]
    query, key, value = cast(tuple[Tensor, Tensor, Tensor], (call.query, call.key, call.value))
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=call.is_causal, scale=call.scale)


def _are_weights(factor: Any, shape: torch.Size) -> bool:
    """Whether this is what the softmax of that shape gave, as it is or with its queries cut into blocks."""
    if factor.dim() == 5 and factor.shape[:2] == shape[:2] and factor.shape[-1] == shape[-1]:
        return factor.shape[2] * factor.shape[3] >= shape[2]
    return factor.shape == shape
