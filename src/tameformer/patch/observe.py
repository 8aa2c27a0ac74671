"""Seeing what happens inside a model's step, without a change to the model.

Between steps nothing is on the model. While a step is observed its root carries two hooks; only while the first forward
pass of that step runs, modules carry hooks that tell who is running, and a `TorchFunctionMode` sees the calls of attention,
the sums of the residual stream and the activations. The mode works on anyone's model, because it looks at functions and at
the identity of tensors, not at classes.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from tameformer.patch.attention_calls import READERS, AttentionCall
from tameformer.patch.blocks import blocks


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


_SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}
_NORMS = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm}
_ACTIVATIONS = {F.relu, torch.relu, Tensor.relu, F.gelu, F.silu}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_LOOKED_AT: dict[str, tuple[tuple[str, Iterable[Any]], ...]] = {
    "on_branch": (("sum", _SUMS), ("norm", _NORMS)),
    "on_activation": (("activation", _ACTIVATIONS),),
    "on_attention": (("attention", READERS),),
    "on_heads": (("attention", READERS), ("product", _PRODUCTS)),
}
"""By event, the functions that make it."""


class Observation:
    """Lets observers see the steps of a model.

    Args:
        model: The root whose calls are forward passes; compiled and distributed ones are looked into, see `unwrapped`.
        observers: Who is told.
        optimizers: Whose steps end the observed step; without any, no gradients and updates are told.
        sequences: How many sequences of a batch `on_attention` and `on_heads` get; None is all.
        counts: Asked when a forward pass begins whether it is one to observe; evaluation inside a training step is not.
    """

    def __init__(
        self,
        model: nn.Module,
        observers: Sequence[Observer],
        *,
        optimizers: Sequence[Optimizer] = (),
        sequences: int | None = 1,
        counts: Callable[[], bool] = lambda: True,
    ) -> None:
        self.model, self.observers, self.optimizers = unwrapped(model), tuple(observers), tuple(optimizers)
        self.sequences, self.counts = sequences, counts
        self.attention_layers: set[str] = set()
        """Layers whose attention was seen in any step so far."""
        self.seen_a_pass = False
        """Whether the present or last step had a forward pass that counts."""
        self._names = {module: name for name, module in self.model.named_modules()}
        self._blocks = {module: name for name, module in blocks(self.model).items()}
        self._seq_first = {name for module, name in self._blocks.items() if _is_seq_first(module)}
        self._stateless = {module for module in self._names if next(module.parameters(), None) is None}
        self._watched = [
            (
                module,
                self._blocks.get(module),
                None if module in self._stateless and module not in self._blocks else name,
            )
            for module, name in self._names.items()
            if name and _may_call(module)
        ]
        self._saw_attention_calls = False
        self._pass: _Pass | None = None
        self._told = self.observers
        self._undo = ExitStack()

    @contextmanager
    def watching(self, observers: Sequence[Observer] | None = None) -> Iterator[None]:
        """Let all observers, or some of them, see the step that runs inside.

        Nothing is left afterwards, also after an exception in the model or in an observer.
        """
        with ExitStack() as undo:
            self._undo, self.seen_a_pass = undo, False
            self._told = self.observers if observers is None else tuple(observers)
            undo.callback(self._end_pass)
            undo.enter_context(_uncompiled())
            undo.callback(self.model.register_forward_pre_hook(self._begin_pass).remove)
            self._last_hook = self.model.register_forward_hook(self._after_pass, always_call=True)
            undo.callback(self._last_hook.remove)
            for optimizer, tell, register in self._optimizer_hooks():
                undo.callback(register(optimizer, tell).remove)
            self._tell("on_begin")
            yield

    def tell_gradients(self) -> None:
        """Tell that the gradients are complete, where no optimizer's step tells it."""
        self._tell("on_gradients")

    def unseen(self) -> list[str]:
        """Modules that are attention by their class's name but called nothing that was seen, once somebody looked."""
        if not self._saw_attention_calls:
            return []
        suspects = [
            name
            for module, name in self._names.items()
            if "attention" in type(module).__name__.lower()
            and next(module.parameters(), None) is not None
            and not any("attention" in type(inner).__name__.lower() for inner in _below(module))
        ]
        seen = self.attention_layers
        return [
            name
            for name in suspects
            if name not in seen
            and not any(f"{name}.".startswith(f"{layer}.") or layer.startswith(f"{name}.") for layer in seen)
        ]

    def _optimizer_hooks(self) -> Iterator[tuple[Optimizer, Callable[..., None], Callable[..., Any]]]:
        if not self.optimizers:
            return
        told: set[str] = set()  # an optimizer that steps twice in a step is told of once

        def gradients() -> None:
            if "gradients" not in told:
                told.add("gradients")
                self._tell("on_gradients")

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
            in_place = args[1] if len(args) > 1 else None
            closure = kwargs.get("closure", in_place)
            if closure is None:
                gradients()
                return None

            def then_gradients() -> Any:  # the gradients come with the closure
                loss = closure()
                gradients()
                return loss

            args = args if in_place is None else (args[0], then_gradients, *args[2:])
            return args, kwargs if in_place is not None else {**kwargs, "closure": then_gradients}

        def update(*_: Any) -> None:
            if "update" not in told:
                told.add("update")
                self._tell("on_update")

        yield self.optimizers[0], before, type(self.optimizers[0]).register_step_pre_hook
        yield self.optimizers[-1], update, type(self.optimizers[-1]).register_step_post_hook

    @torch.no_grad()
    def _tell(self, event: str, *args: Any) -> None:
        try:
            for observer in self._told:
                getattr(observer, event)(*args)
        except BaseException:
            if self._pass is None:  # inside a forward pass the root's hook ends it
                self._undo.close()
            raise

    def _begin_pass(self, module: nn.Module, args: Any) -> None:
        if self._pass is None and not self.seen_a_pass and self.counts():
            self.seen_a_pass = True
            self._pass = _Pass(self)
            self._pass.begin()

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._pass is not None:
            self._end_pass()
            if output is not None:
                self._tell("on_output", output)
            elif self._last_hook.id == next(reversed(self.model._forward_hooks)):
                # The pass failed: go at once. torch is walking through the hooks, and only the last may take itself away.
                self._undo.close()

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.end()
            self._pass = None


class _Pass(TorchFunctionMode):
    """One forward pass under observation."""

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self.observation = observation
        self.wanted = {
            name
            for observer in observation._told
            for name in ("on_attention", "on_heads", "on_branch", "on_activation", "on_block")
            if getattr(type(observer), name) is not getattr(Observer, name)
        }
        self.running: list[str] = [""]  # names of the modules that are running, innermost last
        self.block: list[str] = []
        self.stream: dict[int, Tensor] = {}  # the residual stream and its normalized sums, by identity
        self.sums: dict[int, Tensor] = {}
        self.finished: str | None = None  # the module that ended last, directly inside the running one
        self.named: set[str] = set()
        self.branches = 0  # residual sums in the present block so far
        self.activated: set[str] = set()
        self.weights_shape: torch.Size | None = None
        self.kinds: dict[Any, str] = {
            function: kind
            for event in self.wanted
            for kind, functions in _LOOKED_AT.get(event, ())
            for function in functions
        }
        self.handles: list[RemovableHandle] = []
        self._undo = ExitStack()

    def begin(self) -> None:
        """Look at as little as those who are told want: every hook and every function looked at costs microseconds."""
        with ExitStack() as undo:
            undo.callback(self._unhook)
            for module, block, label in self.observation._watched:
                if block is not None and self.wanted:
                    self._watch_block(module, block)
                elif self.kinds:
                    self._watch(module, label)
            if self.kinds:
                self.observation._saw_attention_calls |= "attention" in self.kinds.values()
                undo.enter_context(self)
            self._undo = undo.pop_all()

    def end(self) -> None:
        self._undo.close()
        self.stream.clear()
        self.sums.clear()

    def _unhook(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _watch(self, module: nn.Module, label: str | None) -> None:
        """Know when this module runs; a stateless one, without a label, runs under the name of the one that called it."""
        is_activation = type(module).__module__ == "transformers.activations"

        def enter(module: nn.Module, args: Any) -> None:
            self.running.append(label or self.running[-1])

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.running.pop()
            if label is not None:
                self.finished = label
            if is_activation and isinstance(output, Tensor):
                self._activation(self.running[-1], output)

        self.handles += module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def _watch_block(self, module: nn.Module, block: str) -> None:
        """Know when this layer runs, and the stream that enters and leaves it."""

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(block)
            self._enter_block(block, _stream_in(args, kwargs))

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.running.pop()
            self.finished = block
            self._leave_block(block, _stream_in(args, kwargs), output)

        self.handles += (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = self.kinds.get(func)
        if kind is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if kind == "sum":
            return self._sum(func, args, kwargs)
        if kind == "attention":
            return self._attention(READERS[func], func, args, kwargs)
        output = func(*args, **kwargs)
        if kind == "norm" and args and id(args[0]) in self.sums:
            self.stream[id(output)] = output  # post-norm: the stream goes on from the norm of the sum
        elif kind == "activation":
            self._activation(self.running[-1], output)
        elif kind == "product" and self.weights_shape is not None and _are_weights(args[0], self.weights_shape):
            heads = output if output.dim() == 4 else output.flatten(2, 3)[:, :, : self.weights_shape[2]]
            self.weights_shape = None
            self._tell("on_heads", self.running[-1], heads[: self.observation.sequences].detach())
        return output

    def _attention(self, reader: Any, func: Any, args: Any, kwargs: Any) -> Any:
        layer, sequences = self.running[-1], self.observation.sequences
        output = func(*args, **kwargs)
        with torch.no_grad():
            call = reader(layer, sequences, args, kwargs)
        if call is None:
            return output
        self.observation.attention_layers.add(layer)
        self._tell("on_attention", call)
        if call.logits is not None:
            self.weights_shape = args[0].shape if args else kwargs["input"].shape
        elif "on_heads" in self.wanted:
            self._tell("on_heads", layer, _heads(func, call, output, sequences))
        return output

    def _sum(self, func: Any, args: Any, kwargs: Any) -> Any:
        pair = args[:2] if len(args) > 1 and all(isinstance(arg, Tensor) for arg in args[:2]) else None
        places = [id(arg) in self.stream for arg in pair] if pair and self.block else []
        if pair is None or places.count(True) != 1 or pair[0].shape != pair[1].shape:
            return func(*args, **kwargs)
        residual, branch = pair if places[0] else pair[::-1]
        self._tell("on_branch", self._branch_name(), self._batch_first(residual), self._batch_first(branch))
        output = func(*args, **kwargs)
        self.stream[id(output)] = self.sums[id(output)] = output
        return output

    def _branch_name(self) -> str:
        """The module that adds, or the one that ended last inside the block; a number where neither tells them apart."""
        block, owner = self.block[-1], self.running[-1]
        self.branches += 1
        name = owner if owner != block else self.finished or ""
        if name in self.named or not name.startswith(f"{block}."):
            name = f"{block}.branch_{self.branches}"
        self.named.add(name)
        return name

    def _enter_block(self, block: str, stream: Tensor | None) -> None:
        self.block.append(block)
        self.finished, self.branches = None, 0
        if stream is not None:
            self.stream[id(stream)] = stream

    def _leave_block(self, block: str, before: Tensor | None, output: Any) -> None:
        after = _stream_out(output)
        if before is not None and after is not None and before.shape == after.shape:
            self._tell("on_block", block, self._batch_first(before), self._batch_first(after))
        self.block.pop()
        self.stream.clear()
        self.sums.clear()

    def _activation(self, layer: str, output: Tensor) -> None:
        if self.block and layer not in self.activated:
            self.activated.add(layer)
            self._tell("on_activation", layer, self._batch_first(output))

    def _batch_first(self, tensor: Tensor) -> Tensor:
        """(batch, seq, dim), whichever way round the present layer works."""
        tensor = tensor.detach()
        return tensor.transpose(0, 1) if self.block[-1] in self.observation._seq_first and tensor.dim() == 3 else tensor

    def _tell(self, event: str, *args: Any) -> None:
        if event not in self.wanted:
            return
        device = args[-1].device.type if isinstance(args[-1], Tensor) else _device(args[-1])
        with ExitStack() as inside:
            inside.enter_context(
                torch._C.DisableTorchFunction()
            )  # else this mode would look at each of their operations
            if torch.is_autocast_enabled(device):
                inside.enter_context(torch.autocast(device, enabled=False))
            self.observation._tell(event, *args)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and `DistributedDataParallel`, whose names are those of a checkpoint."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else None
        )
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled code eagerly meanwhile: a compiled graph calls no hooks; what was compiled stays."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


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


def _device(call: AttentionCall) -> str:
    tensor = call.query if call.query is not None else call.logits
    assert tensor is not None
    return tensor.device.type


def _may_call(module: nn.Module) -> bool:
    """Whether the module may call other modules or attention: all but torch's own leaves."""
    is_leaf = next(module.children(), None) is None
    return not is_leaf or not type(module).__module__.startswith("torch.nn.modules")


def _is_seq_first(block: nn.Module) -> bool:
    """Whether a layer works on (seq, batch, dim), as torch's own do unless told otherwise."""
    return any(isinstance(module, nn.MultiheadAttention) and not module.batch_first for module in block.modules())


def _below(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if inner is not module and next(inner.parameters(), None) is not None)


def _stream_in(args: Any, kwargs: Any) -> Tensor | None:
    """The first (batch, seq, dim) of floats that a layer was called with."""
    return next(filter(_is_stream, [*args, *kwargs.values()]), None)


def _stream_out(output: Any) -> Tensor | None:
    values = output if isinstance(output, (tuple, list)) else output.values() if isinstance(output, dict) else [output]
    return next(filter(_is_stream, values), None)


def _is_stream(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_nested and value.dim() == 3 and value.is_floating_point()
