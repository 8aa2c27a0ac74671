"""The Transformer layers of `torch.nn`."""

from typing import Any

from torch import nn

from tameformer.patch.adapters.branch import Branch, Kind, Matrix, Placement, Tap
from tameformer.patch.adapters.parts import attention_of, branch_of, linear, linears, norm_of


def torch_layers(name: str, block: nn.Module) -> list[Branch] | None:
    """`torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer`, and subclasses that keep their `forward`."""
    if isinstance(block, nn.TransformerEncoderLayer):
        kind, argument, is_same = "encoder", "src", type(block).forward is nn.TransformerEncoderLayer.forward
    elif isinstance(block, nn.TransformerDecoderLayer):
        kind, argument, is_same = "decoder", "tgt", type(block).forward is nn.TransformerDecoderLayer.forward
    else:
        return None
    if not is_same:
        return None
    placement: Placement = "pre" if block.norm_first else "post"
    entry = Tap(block, keyword=argument)
    found = [_multi_head(name, "self_attn", "attention", block, placement, "norm1", entry)]
    if kind == "decoder":
        after = Tap(block.norm1, leaves=True)
        found.append(_multi_head(name, "multihead_attn", "cross_attention", block, placement, "norm2", after))
    last = "norm2" if kind == "encoder" else "norm3"
    found.append(
        branch_of(
            f"{name}.linear2",
            name,
            "feed_forward",
            placement,
            linear(name, block, "linear2"),
            linears(name, block, "linear1"),
            norm=norm_of(name, block, last),
            taps=(Tap(block.norm1 if kind == "encoder" else block.norm2, leaves=True),),
            batch_first=found[0].batch_first,
        )
    )
    return found


def _multi_head(
    name: str, attribute: str, kind: Kind, block: nn.Module, placement: Placement, norm: str, tap: Tap
) -> Branch:
    """A branch that is a `torch.nn.MultiheadAttention`; its `out_proj` is never called as a module."""
    attention: Any = getattr(block, attribute)
    path, dim = f"{name}.{attribute}", attention.embed_dim
    bias = "in_proj_bias" if attention.in_proj_bias is not None else None
    if attention._qkv_same_embed_dim:
        query, key, value = (Matrix(path, attention, "in_proj_weight", bias, i * dim, (i + 1) * dim) for i in range(3))
    else:
        query, key, value = (Matrix(path, attention, f"{letter}_proj_weight", bias) for letter in ("q", "k", "v"))
    output = linear(path, attention, "out_proj")
    return branch_of(
        path,
        name,
        kind,
        placement,
        output,
        [query] if kind == "cross_attention" else [query, key, value],
        attention=attention_of(path, attention, query, key, value),
        result=attention,
        norm=norm_of(name, block, norm),
        taps=(tap,),
        batch_first=attention.batch_first,
    )
