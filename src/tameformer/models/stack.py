"""What the models share: the configuration of a layer, the layers, and the stack of them."""

from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from tameformer.models.parts import PARTS
from tameformer.nn.attention import CollaborativeAttention, MultiHeadAttention, StackCache, check_heads
from tameformer.nn.drop_path import depth_rates
from tameformer.nn.residual import branch_drop
from tameformer.shapes import Float, Mask, Stream, Tokens


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Layers of a Transformer, whatever stands before and after them."""

    architecture: Literal["transformer"] = "transformer"
    """Which architecture this is."""
    dim: int = 128
    """Width of the residual stream, in features."""
    num_heads: int = 4
    """Attention heads of a layer; divides dim."""
    num_kv_heads: int | None = None
    """Key-value heads of a layer, shared among the heads; divides num_heads; None is num_heads."""
    hidden_dim: int | None = None
    """Width of the feed-forward layer, in features; None is 4 dim, or for swiglu 8/3 dim rounded up to 64s."""
    residual: Literal["pre", "post", "peri", "none"] = "pre"
    """Where the norm stands around a residual branch."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """Normalization layer."""
    activation: Literal["relu", "gelu", "swiglu"] = "gelu"
    """Feed-forward layer: two linear layers with ReLU or GELU between, or three with a SiLU gate."""
    positions: Literal[
        "sinusoidal", "learned", "binary", "rotary", "relative", "disentangled", "alibi", "t5", "none"
    ] = "learned"
    """How a token knows where it stands: added to the embeddings, turned, or by distance on the logits."""
    score: Literal["scaled_dot", "dot", "general", "additive", "concat", "gaussian"] = "scaled_dot"
    """From a query and a key to their logit."""
    attention: Literal["full", "windowed", "linear", "collaborative"] = "full"
    """Self-attention to all positions, to near ones only, in linear time, or by heads that share queries and keys."""
    radius: int | None = None
    """Distance of the farthest key of windowed attention, in positions."""
    dropout: float = 0.0
    """Probability of dropping a unit of the embeddings and of each branch's output."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight."""
    drop_path: float = 0.0
    """Probability of dropping a branch for an example, in the last layer; grows linearly from 0 in the first."""
    bias: bool = True
    """Whether linear layers and layer norms have a bias."""

    def __post_init__(self):
        check_choices(self)
        check_heads(self.dim, self.num_heads, self.kv_heads)
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"expected hidden_dim of at least 1, got {self.hidden_dim}; leave it out for 4 dim")
        if self.positions == "rotary" and self.dim // self.num_heads % 2:
            raise ValueError(
                f"expected an even dim / num_heads for rotary positions, got {self.dim} / {self.num_heads} = "
                f"{self.dim // self.num_heads}; change dim or num_heads"
            )
        _check_attention(self)
        if self.positions == "disentangled" and self.score != "scaled_dot":
            raise ValueError(
                f"expected the score scaled_dot beside disentangled positions, got {self.score}; "
                "take relative, t5 or alibi positions"
            )
        if self.positions == "sinusoidal" and self.dim % 2:
            raise ValueError(f"expected an even dim for sinusoidal positions, got {self.dim}; make dim even")
        check_probabilities(self, "dropout", "attention_dropout", "drop_path")

    @property
    def kv_heads(self) -> int:
        """Key-value heads, resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def feed_forward_dim(self) -> int:
        """Width of the feed-forward layer, resolved."""
        return PARTS["hidden_dim"][self.activation](self.dim) if self.hidden_dim is None else self.hidden_dim


def check_choices(config: Any) -> None:
    """Refuses a value that a `Literal` field of the dataclass does not list, and counts below 1.

    Raises:
        ValueError: with the field, the choices and the value.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ValueError(f"expected {name} to be one of {', '.join(get_args(hint))}, got {value!r}")
        if hint is int and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")


def check_probabilities(config: Any, *names: str) -> None:
    """Refuses a value of these fields outside [0, 1).

    Raises:
        ValueError: with the field and the value.
    """
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"expected 0 <= {name} < 1, got {getattr(config, name)}; it is a probability")


def _check_attention(config: "StackConfig") -> None:
    """Refuses parts that the chosen attention has no place for."""
    kind, added = config.attention, ("sinusoidal", "learned", "binary", "none")
    if (config.radius is not None) != (kind == "windowed") or (config.radius or 1) < 1:
        raise ValueError(f"expected a radius of at least 1 for windowed attention only, got {config.radius} for {kind}")
    if kind == "full":
        return
    turned = () if kind == "collaborative" else ("rotary",)
    if config.score != "scaled_dot" or config.positions not in added + turned:
        raise ValueError(
            f"expected the score scaled_dot and positions {', '.join(added + turned)} for {kind} attention, "
            f"got {config.score} and {config.positions}"
        )
    if kind == "linear" and config.attention_dropout:
        raise ValueError(
            f"expected attention_dropout 0 for linear attention, which has no weights to drop, got "
            f"{config.attention_dropout}; take dropout"
        )
    if kind == "collaborative" and config.num_kv_heads is not None:
        raise ValueError(f"expected no num_kv_heads for collaborative heads, got {config.num_kv_heads}; leave it out")


class Layer(nn.Module):
    """Self-attention and feed-forward, each in its residual placement."""

    def __init__(self, attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Stream,
        *,
        mask: Mask | None = None,
        is_causal: bool = False,
        positions: Tokens | None = None,
        cache: StackCache | None = None,
        index: int = 0,
    ) -> Stream:
        """One layer; `cache.own[index]` holds its keys and values."""
        own = None if cache is None else cache.own[index]
        return self.feed_forward(self.attention(x, mask=mask, is_causal=is_causal, positions=positions, cache=own))


class CrossLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each in its residual placement."""

    def __init__(self, attention: nn.Module, cross_attention: nn.Module, feed_forward: nn.Module):
        super().__init__()
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def forward(
        self,
        x: Stream,
        *,
        memory: Float[Tensor, "batch key dim"],
        memory_mask: Mask | None = None,
        mask: Mask | None = None,
        is_causal: bool = False,
        positions: Tokens | None = None,
        cache: StackCache | None = None,
        index: int = 0,
    ) -> Stream:
        """One layer; `cache.own[index]` and `cache.memory[index]` hold its keys and values."""
        own, other = (None, None) if cache is None else (cache.own[index], cache.memory[index])
        x = self.attention(x, mask=mask, is_causal=is_causal, positions=positions, cache=own)
        x = self.cross_attention(x, memory=memory, mask=memory_mask, cache=other)
        return self.feed_forward(x)


class Stack(nn.Module):
    """Layers one after the other, and the norm at the end where the placement needs one."""

    def __init__(self, layers: list[nn.Module], norm: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Identity() if norm is None else norm

    def new_cache(self) -> StackCache:
        """An empty cache with room for every layer's keys and values."""
        return StackCache(len(self.layers))

    def forward(self, x: Stream, **kwargs) -> Stream:
        """The stream after the last layer; keywords go to every layer."""
        for index, layer in enumerate(self.layers):
            x = layer(x, index=index, **kwargs)
        return self.norm(x)

    def outputs(self, x: Stream, **kwargs) -> list[Stream]:
        """The stream before the first layer and after each, all through the norm at the end, so that their scales are alike."""
        found = [self.norm(x)]
        for index, layer in enumerate(self.layers):
            x = layer(x, index=index, **kwargs)
            found.append(self.norm(x))
        return found


def layer_stack(config: StackConfig, *, num_layers: int, max_length: int, cross_attention: bool = False) -> Stack:
    """The stack that `config` describes; rotary positions, if chosen, are one module that all its layers share.

    Positions by distance are part of self-attention only: in cross-attention there is no distance.
    """

    def norm(dim: int) -> nn.Module:
        return PARTS["norm"][config.norm](dim, bias=config.bias)

    def placed(branch: nn.Module, path_rate: float) -> nn.Module:
        return placement(config.dim, branch, norm=norm, drop=branch_drop(config.dropout, path_rate))

    def attention(*, of_itself: bool) -> nn.Module:
        score, kind = PARTS["score"][config.score], config.attention if of_itself else "full"
        if kind == "collaborative":
            return CollaborativeAttention(
                config.dim, config.num_heads, bias=config.bias, dropout=config.attention_dropout
            )
        attend = PARTS["attend"][kind](config)
        return MultiHeadAttention(
            config.dim,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            bias=config.bias,
            dropout=0.0 if attend else config.attention_dropout,
            positions=turn if of_itself else None,
            relative=relative(config.num_heads, head_dim, max_length) if of_itself and relative else None,
            score=None if score is None else score(config.num_heads, head_dim),
            attend=attend,
        )

    placement, head_dim = PARTS["residual"][config.residual], config.dim // config.num_heads
    relative = PARTS["relative_positions"].get(config.positions)
    turned = PARTS["turned_positions"].get(config.positions)
    turn = None if turned is None else turned(max_length, head_dim)
    layers: list[nn.Module] = []
    for rate in depth_rates(config.drop_path, num_layers):
        own = placed(attention(of_itself=True), rate)
        cross = placed(attention(of_itself=False), rate) if cross_attention else None
        feed_forward = PARTS["activation"][config.activation](config.dim, config.feed_forward_dim, bias=config.bias)
        last = placed(feed_forward, rate)
        layers.append(Layer(own, last) if cross is None else CrossLayer(own, cross, last))
    return Stack(layers, norm(config.dim) if placement.needs_final_norm else None)


def added_positions(config: StackConfig, max_length: int) -> nn.Module | None:
    """The module that adds positions to embeddings, or None if `config` chose none that is added."""
    added = PARTS["added_positions"].get(config.positions)
    return None if added is None else added(max_length, config.dim)


def embedding_scale(config: StackConfig) -> float:
    """Factor on the token embeddings: sqrt(dim) beside sinusoidal positions, which would drown them, else 1."""
    return config.dim**0.5 if config.positions == "sinusoidal" else 1.0
