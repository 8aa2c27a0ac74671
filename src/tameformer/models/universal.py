"""One layer applied again and again (Dehghani et al. 2018, "Universal Transformers", arXiv:1807.03819).

The embeddings are multiplied by sqrt(dim), or the vectors of the steps would drown them.
At every step the positions are added anew, and a vector for the step; with adaptive halting each position takes as many steps
as it wants. Differs from the released code: the result is the mean of the states weighted by the halting shares, as in Graves
2016, and a position that has halted keeps its state, as the paper says.

Methods that count layers see one: scales by depth do not know of the steps. `tame.sigma_reparam` needs no depth.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tameformer.models.decoder import Decoder
from tameformer.models.encoder import Encoder
from tameformer.models.initialize import Initializer, xavier_init
from tameformer.models.stack import Stack, StackConfig, added_positions, layer_stack
from tameformer.nn.attention import StackCache
from tameformer.nn.embedding import OutputHead, TokenEmbedding
from tameformer.nn.halting import Halted, Halting
from tameformer.nn.positions import sinusoidal_table
from tameformer.shapes import Float, Mask, Real, Stream, Tokens


@dataclass(frozen=True, kw_only=True)
class UniversalConfig(StackConfig):
    """An encoder whose one layer is applied several times."""

    architecture: Literal["universal"] = "universal"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Which architecture this is."""
    num_steps: int = 4
    """How often the layer is applied; with adaptive halting at most."""
    halting: Literal["fixed", "adaptive"] = "fixed"
    """Whether all positions take all steps, or each decides."""
    halting_threshold: float = 0.99
    """Sum of halting probabilities at which a position stops; read with adaptive halting only."""
    ponder_weight: float = 0.01
    """Weight of the steps that a position takes, on average, in the loss of a recipe; read with adaptive halting only."""
    max_length: int = 256
    """Longest sequence, in tokens."""

    def __post_init__(self):
        super().__post_init__()
        if self.ponder_weight < 0:
            raise ValueError(f"expected a ponder_weight of at least 0, got {self.ponder_weight}")
        if self.dim % 2:
            raise ValueError(f"expected an even dim for the vectors of the steps, got {self.dim}; make dim even")


@dataclass(frozen=True, kw_only=True)
class UniversalDecoderConfig(UniversalConfig):
    """A language model whose one layer is applied several times."""

    tie_embeddings: bool = True
    """Whether the logits use the weight of the token embedding."""


class UniversalStack(Stack):
    """One layer, applied `num_steps` times, in the place of a `Stack`.

    Attributes:
        halted: after a forward pass with halting, what each position spent, with its gradient; see `ponder_cost`.
    """

    steps: Tensor

    def __init__(self, stack: Stack, positions: nn.Module | None, halting: Halting | None, num_steps: int, dim: int):
        super().__init__(list(stack.layers), stack.norm)
        self.positions, self.halting, self.num_steps = positions, halting, num_steps
        self.register_buffer("steps", sinusoidal_table(num_steps + 1, dim)[1:], persistent=False)
        self.halted: Halted | None = None

    def new_cache(self) -> StackCache:
        """An empty cache with room for the keys and values of every step."""
        return StackCache(self.num_steps)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Stream,
        *,
        mask: Mask | None = None,
        is_causal: bool = False,
        positions: Tokens | None = None,
        cache: StackCache | None = None,
    ) -> Stream:
        """The stream after the last step, or the mean over the steps weighted by halting."""
        given = {"mask": mask, "is_causal": is_causal, "positions": positions, "cache": cache}
        start = 0 if cache is None else cache.length
        (layer,) = self.layers
        done, result = None if self.halting is None else self.halting.begin(x), torch.zeros_like(x)
        for step in range(self.num_steps):
            y = x if self.positions is None else self.positions(x, positions, start=start)
            y = layer(y + self.steps[step].to(x.dtype), index=step, **given)
            if self.halting is None or done is None:
                x = y
                continue
            x = torch.where(done.running[..., None], y, x)
            share = self.halting.share(x, done, is_last=step + 1 == self.num_steps)
            result = result + share[..., None] * x
            # With a cache every step goes on: later positions attend to the states of this one at all steps. On an
            # accelerator, too: steps after the last position has halted change nothing, and to ask would be to wait for it.
            if cache is None and x.device.type == "cpu" and not done.running.any():
                break
        self.halted = done
        return self.norm(x if done is None else result)


def ponder_cost(model: nn.Module, real: Real | None = None) -> Float[Tensor, ""]:
    """Steps that a position took in the last forward pass, on average; add it to the loss, times 0.01 or so.

    Args:
        model: What was called.
        real: True where a position counts, False at padding; None counts all.

    Raises:
        ValueError: nothing in the model halts, or it was not called yet.

    Example:
        >>> model = universal_encoder(UniversalConfig(dim=16, halting="adaptive"), vocab_size=65)
        >>> outputs = model(torch.zeros(2, 8, dtype=torch.long))
        >>> 1 < ponder_cost(model).item() < 5
        True
    """
    costs = [
        module.halted.cost(real) for module in model.modules() if isinstance(module, UniversalStack) and module.halted
    ]
    if not costs:
        raise ValueError(
            "expected a model with halting='adaptive' after a forward pass, got none; call the model first"
        )
    return torch.stack(costs).sum()


def steps_taken(model: nn.Module) -> Float[Tensor, "batch seq"] | None:
    """Steps that each position took in the last forward pass, padding included; None where nothing halts.

    Example:
        >>> model = universal_encoder(UniversalConfig(dim=16, halting="adaptive"), vocab_size=65)
        >>> outputs = model(torch.zeros(1, 3, dtype=torch.long))
        >>> steps_taken(model).shape
        torch.Size([1, 3])
    """
    found = [module.halted for module in model.modules() if isinstance(module, UniversalStack)]
    return next((halted.steps for halted in found if halted is not None), None)


def universal_encoder(config: UniversalConfig, *, vocab_size: int, initialize: Initializer = xavier_init) -> Encoder:
    """An encoder with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> model = universal_encoder(UniversalConfig(dim=32), vocab_size=65)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 32])
    """
    embedding = TokenEmbedding(vocab_size, config.dim, scale=config.dim**0.5)
    model = Encoder(embedding, None, config.dropout, _stack(config))
    initialize(model)
    return model


def universal_decoder(
    config: UniversalDecoderConfig, *, vocab_size: int, initialize: Initializer = xavier_init
) -> Decoder:
    """A language model with fresh weights, the same for the same `torch.manual_seed`.

    Example:
        >>> model = universal_decoder(UniversalDecoderConfig(dim=32, halting="adaptive"), vocab_size=65)
        >>> model(torch.zeros(1, 8, dtype=torch.long)).shape
        torch.Size([1, 8, 65])
    """
    model = Decoder(
        TokenEmbedding(vocab_size, config.dim, scale=config.dim**0.5),
        None,
        config.dropout,
        _stack(config),
        None if config.tie_embeddings else OutputHead(config.dim, vocab_size),
        config.max_length,
    )
    initialize(model)
    return model


def _stack(config: UniversalConfig) -> UniversalStack:
    return UniversalStack(
        layer_stack(config, num_layers=1, max_length=config.max_length),
        added_positions(config, config.max_length),
        Halting(config.dim, threshold=config.halting_threshold) if config.halting == "adaptive" else None,
        config.num_steps,
        config.dim,
    )
