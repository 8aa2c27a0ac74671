"""torch.nn, and modules of anyone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.family import FUTURE, REAL, STREAM, Family, Kind, Layers, Sum, noise


class WithHead(nn.Module):
    """An attention module alone, with classes behind it."""

    def __init__(self, attention: nn.Module, *, need_weights: bool):
        super().__init__()
        self.attention, self.head, self.need_weights = attention, nn.Linear(16, 5), need_weights

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        mixed, _ = self.attention(query, key, value, key_padding_mask=padding, need_weights=self.need_weights)
        return self.head(mixed)


class Plain(nn.Module):
    """Somebody's own layer, which calls torch's function."""

    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in self.project(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.1 * self.training)
        return self.head(mixed.transpose(1, 2).flatten(2))


class Functional(nn.Module):
    """Somebody's own layer, which calls what `MultiheadAttention` calls, with masks in which True forbids."""

    def __init__(self):
        super().__init__()
        self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.empty(48, 16)), nn.Parameter(torch.zeros(48))
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, padding: Tensor, future: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        weights: Any = (self.in_proj_weight, self.in_proj_bias, None, None, False, 0.1, self.out.weight, self.out.bias)
        masks: Any = {"key_padding_mask": padding, "attn_mask": future}
        mixed, _ = F.multi_head_attention_forward(
            x, x, x, 16, 2, *weights, training=self.training, need_weights=False, **masks
        )
        return self.head(mixed.transpose(0, 1))


def torch_layers(name: str, *, cross: bool = False, pre: bool = False, kind: Kind = "self") -> Layers:
    norms = [None] * 3 if pre else ["norm1", "norm2", "norm3"]
    sums: list[Sum] = [("self_attn", "self_attn", norms[0])]
    if cross:
        sums.append(("multihead_attn", "multihead_attn", norms[1]))
    sums.append((f"branch_{len(sums) + 1}", "linear2", norms[len(sums)]))
    attention: dict[str, Kind] = {"self_attn": kind, **({"multihead_attn": "cross"} if cross else {})}
    return Layers(name, attention, tuple(sums), "")


def torch_encoder(*, pre: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True, norm_first=pre)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def torch_attention(name: str, *, need_weights: bool, **widths: Any) -> Family:
    width = widths.get("kdim", 16)
    return Family(
        name,
        lambda: WithHead(nn.MultiheadAttention(16, 2, 0.1, batch_first=True, **widths), need_weights=need_weights),
        lambda: {
            "query": noise(2, 7, 16),
            "key": noise(2, 7, width),
            "value": noise(2, 7, widths.get("vdim", 16)),
            "padding": ~REAL,
        },
        attention={"attention": "self"},
        real=REAL,
    )


TORCH = [
    Family(
        "torch-encoder-post",
        lambda: torch_encoder(pre=False),
        lambda: {"src": noise(2, 7, 16), "src_key_padding_mask": ~REAL},
        (torch_layers("layers"),),
        real=REAL,
        unseen=STREAM,
    ),
    Family(
        "torch-encoder-pre-causal",
        lambda: torch_encoder(pre=True),
        lambda: {"src": noise(2, 7, 16), "mask": FUTURE, "is_causal": True},
        (torch_layers("layers", pre=True, kind="causal"),),
        unseen=STREAM,
    ),
    Family(
        "torch-decoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, 0.1, batch_first=True), 2),
        lambda: {
            "tgt": noise(2, 5, 16),
            "memory": noise(2, 7, 16),
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5),
            "memory_key_padding_mask": ~REAL,
        },
        (torch_layers("layers", cross=True, kind="causal"),),
        real=REAL,
        unseen=STREAM,
    ),
    Family(
        "torch-transformer",
        lambda: nn.Transformer(16, 2, 2, 2, 32, 0.1, batch_first=True),
        lambda: {
            "src": noise(2, 7, 16),
            "tgt": noise(2, 5, 16),
            "tgt_mask": FUTURE[:5, :5],
            "src_key_padding_mask": ~REAL,
            "memory_key_padding_mask": ~REAL,
        },
        (
            torch_layers("encoder.layers"),
            torch_layers("decoder.layers", cross=True, kind="causal"),
        ),
        real=REAL,
        unseen=STREAM,
    ),
    torch_attention("torch-attention", need_weights=False),
    torch_attention("torch-attention-separate", need_weights=False, kdim=12, vdim=10),
    torch_attention("torch-attention-weights", need_weights=True),
    Family(
        "functional",
        Functional,
        lambda: {"x": noise(2, 7, 16), "padding": ~REAL, "future": FUTURE},
        attention={"": "causal"},
        real=REAL,
    ),
    Family(
        "plain",
        Plain,
        lambda: {"x": noise(2, 7, 16), "mask": REAL[:, None, None, :]},
        attention={"": "self"},
        real=REAL,
    ),
]
