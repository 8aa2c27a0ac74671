"""What there is to be seen in a family of models, and the inputs that several of them share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = Literal["self", "causal", "cross"]
Sum = tuple[str, str, str | None]
"""A residual sum: its label, the module whose output is the branch, the norm behind the sum or None; inside a layer."""


@dataclass(frozen=True)
class Layers:
    """Alike layers of a model."""

    name: str
    attention: Mapping[str, Kind]
    sums: tuple[Sum, ...]
    activation: str
    count: int = 2

    def names(self) -> list[str]:
        return [f"{self.name}.{index}" for index in range(self.count)]


@dataclass(frozen=True)
class Family:
    """A model, its input, and what is in it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    layers: tuple[Layers, ...] = ()
    attention: Mapping[str, Kind] = field(default_factory=dict)
    """Attention outside of layers."""
    heads: int = 2
    real: Tensor | None = None
    """(batch, seq), True at tokens that are not padding; None where nothing is."""
    unseen: tuple[str, ...] = ()
    """What `unseen()` names."""

    @property
    def has_logits(self) -> bool:
        return "log_partition" not in self.unseen

    def attention_layers(self) -> dict[str, Kind]:
        inside: dict[str, Kind] = {
            f"{name}.{attention}": kind
            for layers in self.layers
            for name in layers.names()
            for attention, kind in layers.attention.items()
        }
        return {**self.attention, **inside}

    def visible(self, kind: Kind, queries: int, keys: int) -> Tensor:
        """(batch, 1, query, key), True = may attend."""
        allowed = torch.ones(2, 1, queries, keys, dtype=torch.bool)
        if self.real is not None and self.real.shape[1] == keys:  # sources and targets differ in length
            allowed &= self.real[:, None, None, :]
        return allowed.tril() if kind == "causal" else allowed

    def model(self, seed: int = 0) -> nn.Module:
        """With weights large enough for attention that is far from uniform."""
        torch.manual_seed(seed)
        model = self.build()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
        return model.train()


def main_output(output: Any) -> Tensor:
    """Logits, or what is the output otherwise."""
    return output if isinstance(output, Tensor) else output.logits


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def tokens(length: int) -> Tensor:
    return torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(length))


REAL = torch.arange(7) < torch.tensor([[5], [7]])
LEFT = REAL.flip(1)
FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)
STREAM = ("log_partition",)
"""Unseen where a model ends with its stream."""
