"""The layers whose residual branches we know, told by class or by the names of their parts; all parts must be known.

A family is a function from a layer's name in the model and the layer to its branches in order, or None where the layer is
no member of it. The stack's name and the number of uses are filled in by `branches`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tameformer.patch.adapters.branch import QK_NORMS, Attention, Branch, Kind, Matrix, NormPlace, Placement, Tap

Family = Callable[[str, nn.Module], list[Branch] | None]


def _branch(name: str, block: str, kind: Kind, placement: Placement, output: Matrix, inputs: Sequence[Matrix], **more):
    given = {"result": output.module, **more}
    return Branch(name, block, "", kind, placement, output, inputs=tuple(inputs), **given)


def _linear(prefix: str, parent: nn.Module, attribute: str) -> Matrix:
    module = parent.get_submodule(attribute)
    bias = "bias" if getattr(module, "bias", None) is not None else None
    return Matrix(f"{prefix}.{attribute}", module, bias=bias, is_transposed=_is_transposed(module))


def _linears(prefix: str, parent: nn.Module, *attributes: str) -> list[Matrix]:
    return [_linear(prefix, parent, attribute) for attribute in attributes]


def _attention(name: str, module: nn.Module, query: Matrix, key: Matrix, value: Matrix, **more) -> Attention:
    """The width of a head, and the scale where it is not the usual one, are attributes of the module."""
    words = ("head_dim", "attention_head_size", "key_value_proj_dim")
    head_dim = next(getattr(module, word) for word in words if hasattr(module, word))
    scale = more.get("scale", getattr(module, "scaling", head_dim**-0.5))
    return Attention(name, module, query, key, value, head_dim=head_dim, scale=scale)


def _is_transposed(module: nn.Module) -> bool:
    return any(parent.__name__ == "Conv1D" for parent in type(module).__mro__)


def _norm(prefix: str, parent: nn.Module, attribute: str) -> NormPlace:
    return NormPlace(f"{prefix}.{attribute}", parent, attribute)


def _has(module: nn.Module, *paths: str) -> bool:
    """Whether the module has all these parts, and besides them only what holds no parameters."""
    parts: dict[str, nn.Module] = {}
    for path in paths:
        part: Any = module
        for word in path.split("."):
            part = getattr(part, word, None)
        if not isinstance(part, nn.Module):
            return False
        parts[path] = part
    named = {path.split(".")[0] for path in paths}
    return all(name in named or not any(True for _ in child.parameters()) for name, child in module.named_children())


def _class(module: nn.Module) -> set[str]:
    """Names of the module's class and its parents: a class that torch swapped in for a parametrization counts too."""
    return {parent.__name__ for parent in type(module).__mro__}


def ours(name: str, block: nn.Module) -> list[Branch] | None:
    """The layers of `tameformer.models`."""
    placements: dict[str, Placement] = {"PreNorm": "pre", "PostNorm": "post", "PeriNorm": "peri", "NoNorm": "none"}
    parts: dict[str, Any] = dict(block.named_children())
    if not parts or any(not _class(part) & set(placements) or not hasattr(part, "branch") for part in parts.values()):
        return None
    found = []
    for attribute, part in parts.items():
        placement: Placement = next(placements[word] for word in _class(part) if word in placements)
        prefix, branch = f"{name}.{attribute}", part.branch
        norm = _norm(prefix, part, "norm") if hasattr(part, "norm") else None
        more = {"norm": norm, "taps": (Tap(part, keyword="residual"),)}
        # A linear map before a norm has no scale of its own: the norm's weight is what ends the branch.
        last = _linear(prefix, part, "out_norm") if placement == "peri" else None
        path = f"{prefix}.branch"
        more_parts = [name for name in (*QK_NORMS, "relative", "attend") if getattr(branch, name, None) is not None]
        if _has(branch, "query", "key", "value", "out", *more_parts):
            query, key, value, out = _linears(path, branch, "query", "key", "value", "out")
            is_cross = attribute == "cross_attention"
            kind: Kind = "cross_attention" if is_cross else "attention"
            inputs = [query] if is_cross else [query, key, value]
            scale = {} if getattr(branch.attend, "scale", None) is None else {"scale": branch.attend.scale}
            attention = _attention(path, branch, query, key, value, **scale)
            found.append(_branch(prefix, name, kind, placement, last or out, inputs, attention=attention, **more))
        elif hasattr(branch, "up") and hasattr(branch, "down"):
            inputs = _linears(path, branch, *(["gate", "up"] if hasattr(branch, "gate") else ["up"]))
            down = _linear(path, branch, "down")
            found.append(_branch(prefix, name, "feed_forward", placement, last or down, inputs, **more))
        else:
            return None
    return found


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
        _branch(
            f"{name}.linear2",
            name,
            "feed_forward",
            placement,
            _linear(name, block, "linear2"),
            _linears(name, block, "linear1"),
            norm=_norm(name, block, last),
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
    output = _linear(path, attention, "out_proj")
    return _branch(
        path,
        name,
        kind,
        placement,
        output,
        [query] if kind == "cross_attention" else [query, key, value],
        attention=_attention(path, attention, query, key, value),
        result=attention,
        norm=_norm(name, block, norm),
        taps=(tap,),
        batch_first=attention.batch_first,
    )


def bert(name: str, block: nn.Module) -> list[Branch] | None:
    """BERT, RoBERTa, ELECTRA and others with their layer, with or without cross-attention."""
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    parts = [*(f"attention.{part}" for part in attention), "intermediate.dense", "output.dense", "output.LayerNorm"]
    has_cross = isinstance(getattr(block, "crossattention", None), nn.Module)
    parts += [f"crossattention.{part}" for part in attention] if has_cross else []
    if not _has(block, *parts):
        return None

    def placed(path: str, kind: Kind, inputs: Sequence[Matrix], attention: Attention | None = None) -> Branch:
        prefix, module = (f"{name}.{path}" if path else name), block.get_submodule(path) if path else block
        output: Any = module.output
        return _branch(
            f"{prefix}.output",
            name,
            kind,
            "post",
            _linear(f"{prefix}.output", output, "dense"),
            inputs,
            attention=attention,
            norm=_norm(f"{prefix}.output", output, "LayerNorm"),
            taps=(Tap(output, position=1, keyword="input_tensor"),),
        )

    def attends(path: str) -> Attention:
        query, key, value = _linears(name, block, *(f"{path}.{word}" for word in ("query", "key", "value")))
        return _attention(f"{name}.{path}", block.get_submodule(path), query, key, value)

    own = attends("attention.self")
    found = [placed("attention", "attention", [own.query, own.key, own.value], own)]
    if has_cross:
        cross = attends("crossattention.self")
        found.append(placed("crossattention", "cross_attention", [cross.query], cross))
    found.append(placed("", "feed_forward", _linears(name, block, "intermediate.dense")))
    return found


def distilbert(name: str, block: nn.Module) -> list[Branch] | None:
    """DistilBERT."""
    letters = [f"attention.{word}" for word in ("q_lin", "k_lin", "v_lin", "out_lin")]
    if not _has(block, *letters, "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"):
        return None
    query, key, value, out = _linears(name, block, *letters)
    up, down = _linears(name, block, "ffn.lin1", "ffn.lin2")
    first = _norm(name, block, "sa_layer_norm")
    entry, after = Tap(block, keyword="hidden_states"), Tap(first.module, leaves=True)
    inputs, label = [query, key, value], f"{name}.attention"
    attention = _attention(label, block.get_submodule("attention"), query, key, value)
    return [
        _branch(label, name, "attention", "post", out, inputs, attention=attention, norm=first, taps=(entry,)),
        _branch(
            f"{name}.ffn",
            name,
            "feed_forward",
            "post",
            down,
            [up],
            norm=_norm(name, block, "output_layer_norm"),
            taps=(after,),
        ),
    ]


def vit(name: str, block: nn.Module) -> list[Branch] | None:
    """ViT and DeiT."""
    letters = [f"attention.{word}" for word in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if not _has(block, *letters, "layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"):
        return None
    return _two_pre(name, block, letters, "layernorm_before", "layernorm_after", ["mlp.fc1"], "mlp.fc2")


def llama(name: str, block: nn.Module) -> list[Branch] | None:
    """Llama, Mistral, Qwen and others with their layer: two norms, gated feed-forward."""
    letters = [f"self_attn.{word}" for word in ("q_proj", "k_proj", "v_proj", "o_proj")]
    gated = [f"mlp.{word}" for word in ("gate_proj", "up_proj")]
    if not _has(block, *letters, *gated, "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
        return None
    return _two_pre(name, block, letters, "input_layernorm", "post_attention_layernorm", gated, "mlp.down_proj")


def _two_pre(
    name: str, block: nn.Module, letters: list[str], first: str, second: str, ups: list[str], down: str
) -> list[Branch]:
    query, key, value, out = _linears(name, block, *letters)
    attention, feed_forward = letters[0].rpartition(".")[0], down.rpartition(".")[0]
    return [
        _branch(
            f"{name}.{attention}",
            name,
            "attention",
            "pre",
            out,
            [query, key, value],
            attention=_attention(f"{name}.{attention}", block.get_submodule(attention), query, key, value),
            norm=_norm(name, block, first),
        ),
        _branch(
            f"{name}.{feed_forward}",
            name,
            "feed_forward",
            "pre",
            _linear(name, block, down),
            _linears(name, block, *ups),
            norm=_norm(name, block, second),
        ),
    ]


def gpt2(name: str, block: nn.Module) -> list[Branch] | None:
    """GPT-2, with or without cross-attention: fused and transposed projections."""
    has_cross = isinstance(getattr(block, "crossattention", None), nn.Module)
    cross = ["crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj", "ln_cross_attn"]
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    if not _has(block, *parts, *(cross if has_cross else [])):
        return None
    fused = _linear(name, block, "attn.c_attn")
    dim = fused.view().shape[0] // 3
    query, key, value = (_rows(fused, i * dim, (i + 1) * dim) for i in range(3))
    out = _linear(name, block, "attn.c_proj")
    inputs, norm, label = [query, key, value], _norm(name, block, "ln_1"), f"{name}.attn"
    attention = _attention(label, block.get_submodule("attn"), query, key, value)
    found = [_branch(label, name, "attention", "pre", out, inputs, attention=attention, norm=norm)]
    if has_cross:
        fused = _linear(name, block, cross[0])
        key, value = _rows(fused, 0, dim), _rows(fused, dim, 2 * dim)
        query, out = _linears(name, block, cross[1], cross[2])
        norm, label = _norm(name, block, "ln_cross_attn"), f"{name}.crossattention"
        attention = _attention(label, block.get_submodule("crossattention"), query, key, value)
        found.append(_branch(label, name, "cross_attention", "pre", out, [query], attention=attention, norm=norm))
    up, down = _linears(name, block, "mlp.c_fc", "mlp.c_proj")
    found.append(_branch(f"{name}.mlp", name, "feed_forward", "pre", down, [up], norm=_norm(name, block, "ln_2")))
    return found


def _rows(matrix: Matrix, start: int, stop: int) -> Matrix:
    return Matrix(
        matrix.name, matrix.module, matrix.weight, matrix.bias, start, stop, is_transposed=matrix.is_transposed
    )


def t5(name: str, block: nn.Module) -> list[Branch] | None:
    """T5 and mT5."""
    kinds: dict[str, Kind] = {
        "T5LayerSelfAttention": "attention",
        "T5LayerCrossAttention": "cross_attention",
        "T5LayerFF": "feed_forward",
    }
    parts = getattr(block, "layer", None)
    if not isinstance(parts, nn.ModuleList) or not all(any(_t5_kind(part, k) for k in kinds) for part in parts):
        return None
    found = []
    for index, part in enumerate(parts):
        prefix = f"{name}.layer.{index}"
        kind: Kind = next(kind for word, kind in kinds.items() if _t5_kind(part, word))
        norm = _norm(prefix, part, "layer_norm")
        if kind == "feed_forward":
            ups = ["wi_0", "wi_1"] if hasattr(part.DenseReluDense, "wi_0") else ["wi"]
            inputs = _linears(prefix, part, *(f"DenseReluDense.{up}" for up in ups))
            output, attention = _linear(prefix, part, "DenseReluDense.wo"), None
        else:
            path = "SelfAttention" if kind == "attention" else "EncDecAttention"
            query, key, value, output = _linears(prefix, part, *(f"{path}.{letter}" for letter in "qkvo"))
            inputs = [query, key, value] if kind == "attention" else [query]
            owner = part.get_submodule(path)
            attention = _attention(f"{prefix}.{path}", owner, query, key, value, scale=1.0)
        found.append(_branch(prefix, name, kind, "pre", output, inputs, attention=attention, norm=norm))
    return found


def _t5_kind(part: nn.Module, word: str) -> bool:
    return any(name.endswith(word) for name in _class(part))  # T5, MT5, UMT5


_POST = ("Bart", "Marian", "BlenderbotSmall", "PLBart")
_PRE = ("MBart", "Pegasus", "Whisper", "M2M100", "Blenderbot", "Speech2Text")


def bart(name: str, block: nn.Module) -> list[Branch] | None:
    """BART, Marian and the models that took over their layer, some of which moved the norms to the front."""
    own = [f"self_attn.{word}" for word in ("q_proj", "k_proj", "v_proj", "out_proj")]
    other = [f"encoder_attn.{word}" for word in ("q_proj", "k_proj", "v_proj", "out_proj")]
    has_cross = isinstance(getattr(block, "encoder_attn", None), nn.Module)
    parts = [*own, "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    parts += [*other, "encoder_attn_layer_norm"] if has_cross else []
    families = {word.removesuffix("EncoderLayer").removesuffix("DecoderLayer") for word in _class(block)}
    if not families & {*_POST, *_PRE} or not _has(block, *parts):
        return None
    placement: Placement = "post" if families & set(_POST) else "pre"
    taps = [Tap(block, keyword="hidden_states"), Tap(block.get_submodule("self_attn_layer_norm"), leaves=True)]
    query, key, value, out = _linears(name, block, *own)
    found = [
        _branch(
            f"{name}.self_attn",
            name,
            "attention",
            placement,
            out,
            [query, key, value],
            attention=_attention(f"{name}.self_attn", block.get_submodule("self_attn"), query, key, value),
            norm=_norm(name, block, "self_attn_layer_norm"),
            taps=(taps[0],),
        )
    ]
    if has_cross:
        query, key, value, out = _linears(name, block, *other)
        norm = _norm(name, block, "encoder_attn_layer_norm")
        found.append(
            _branch(
                f"{name}.encoder_attn",
                name,
                "cross_attention",
                placement,
                out,
                [query],
                attention=_attention(f"{name}.encoder_attn", block.get_submodule("encoder_attn"), query, key, value),
                norm=norm,
                taps=(taps[1],),
            )
        )
        taps.append(Tap(norm.module, leaves=True))
    up, down = _linears(name, block, "fc1", "fc2")
    norm = _norm(name, block, "final_layer_norm")
    # Without an encoder's output cross-attention is skipped: then the stream comes from the first norm.
    found.append(_branch(f"{name}.fc2", name, "feed_forward", placement, down, [up], norm=norm, taps=tuple(taps[1:])))
    return found


FAMILIES: dict[str, Family] = {
    "tameformer.models": ours,
    "torch.nn.Transformer*Layer": torch_layers,
    "BERT, RoBERTa": bert,
    "DistilBERT": distilbert,
    "ViT, DeiT": vit,
    "Llama, Mistral, Qwen": llama,
    "GPT-2": gpt2,
    "T5": t5,
    "BART, Marian": bart,
}
"""What messages call a family, and its function."""
