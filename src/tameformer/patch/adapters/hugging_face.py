"""The layers of Hugging Face transformers, by the families that share one; all parts of a layer must be known."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from tameformer.patch.adapters.branch import Attention, Branch, Kind, Matrix, Placement, Tap
from tameformer.patch.adapters.parts import attention_of, branch_of, class_names, has_only, linear, linears, norm_of


def bert(name: str, block: nn.Module) -> list[Branch] | None:
    """BERT, RoBERTa, ELECTRA and others with their layer, with or without cross-attention."""
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    parts = [*(f"attention.{part}" for part in attention), "intermediate.dense", "output.dense", "output.LayerNorm"]
    has_cross = isinstance(getattr(block, "crossattention", None), nn.Module)
    parts += [f"crossattention.{part}" for part in attention] if has_cross else []
    if not has_only(block, *parts):
        return None

    def placed(path: str, kind: Kind, inputs: Sequence[Matrix], attention: Attention | None = None) -> Branch:
        prefix, module = (f"{name}.{path}" if path else name), block.get_submodule(path) if path else block
        output: Any = module.output
        return branch_of(
            f"{prefix}.output",
            name,
            kind,
            "post",
            linear(f"{prefix}.output", output, "dense"),
            inputs,
            attention=attention,
            norm=norm_of(f"{prefix}.output", output, "LayerNorm"),
            taps=(Tap(output, position=1, keyword="input_tensor"),),
        )

    def attends(path: str) -> Attention:
        query, key, value = linears(name, block, *(f"{path}.{word}" for word in ("query", "key", "value")))
        return attention_of(f"{name}.{path}", block.get_submodule(path), query, key, value)

    own = attends("attention.self")
    found = [placed("attention", "attention", [own.query, own.key, own.value], own)]
    if has_cross:
        cross = attends("crossattention.self")
        found.append(placed("crossattention", "cross_attention", [cross.query], cross))
    found.append(placed("", "feed_forward", linears(name, block, "intermediate.dense")))
    return found


def distilbert(name: str, block: nn.Module) -> list[Branch] | None:
    """DistilBERT."""
    letters = [f"attention.{word}" for word in ("q_lin", "k_lin", "v_lin", "out_lin")]
    if not has_only(block, *letters, "sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"):
        return None
    query, key, value, out = linears(name, block, *letters)
    up, down = linears(name, block, "ffn.lin1", "ffn.lin2")
    first = norm_of(name, block, "sa_layer_norm")
    entry, after = Tap(block, keyword="hidden_states"), Tap(first.module, leaves=True)
    inputs, label = [query, key, value], f"{name}.attention"
    attention = attention_of(label, block.get_submodule("attention"), query, key, value)
    return [
        branch_of(label, name, "attention", "post", out, inputs, attention=attention, norm=first, taps=(entry,)),
        branch_of(
            f"{name}.ffn",
            name,
            "feed_forward",
            "post",
            down,
            [up],
            norm=norm_of(name, block, "output_layer_norm"),
            taps=(after,),
        ),
    ]


def vit(name: str, block: nn.Module) -> list[Branch] | None:
    """ViT and DeiT."""
    letters = [f"attention.{word}" for word in ("q_proj", "k_proj", "v_proj", "o_proj")]
    if not has_only(block, *letters, "layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"):
        return None
    return _two_pre(name, block, letters, "layernorm_before", "layernorm_after", ["mlp.fc1"], "mlp.fc2")


def llama(name: str, block: nn.Module) -> list[Branch] | None:
    """Llama, Mistral, Qwen and others with their layer: two norms, gated feed-forward."""
    letters = [f"self_attn.{word}" for word in ("q_proj", "k_proj", "v_proj", "o_proj")]
    gated = [f"mlp.{word}" for word in ("gate_proj", "up_proj")]
    if not has_only(block, *letters, *gated, "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
        return None
    return _two_pre(name, block, letters, "input_layernorm", "post_attention_layernorm", gated, "mlp.down_proj")


def _two_pre(
    name: str, block: nn.Module, letters: list[str], first: str, second: str, ups: list[str], down: str
) -> list[Branch]:
    query, key, value, out = linears(name, block, *letters)
    attention, feed_forward = letters[0].rpartition(".")[0], down.rpartition(".")[0]
    return [
        branch_of(
            f"{name}.{attention}",
            name,
            "attention",
            "pre",
            out,
            [query, key, value],
            attention=attention_of(f"{name}.{attention}", block.get_submodule(attention), query, key, value),
            norm=norm_of(name, block, first),
        ),
        branch_of(
            f"{name}.{feed_forward}",
            name,
            "feed_forward",
            "pre",
            linear(name, block, down),
            linears(name, block, *ups),
            norm=norm_of(name, block, second),
        ),
    ]


def gpt2(name: str, block: nn.Module) -> list[Branch] | None:
    """GPT-2, with or without cross-attention: fused and transposed projections."""
    has_cross = isinstance(getattr(block, "crossattention", None), nn.Module)
    cross = ["crossattention.c_attn", "crossattention.q_attn", "crossattention.c_proj", "ln_cross_attn"]
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    if not has_only(block, *parts, *(cross if has_cross else [])):
        return None
    fused = linear(name, block, "attn.c_attn")
    dim = fused.view().shape[0] // 3
    query, key, value = (_rows(fused, i * dim, (i + 1) * dim) for i in range(3))
    out = linear(name, block, "attn.c_proj")
    inputs, norm, label = [query, key, value], norm_of(name, block, "ln_1"), f"{name}.attn"
    attention = attention_of(label, block.get_submodule("attn"), query, key, value)
    found = [branch_of(label, name, "attention", "pre", out, inputs, attention=attention, norm=norm)]
    if has_cross:
        fused = linear(name, block, cross[0])
        key, value = _rows(fused, 0, dim), _rows(fused, dim, 2 * dim)
        query, out = linears(name, block, cross[1], cross[2])
        norm, label = norm_of(name, block, "ln_cross_attn"), f"{name}.crossattention"
        attention = attention_of(label, block.get_submodule("crossattention"), query, key, value)
        found.append(branch_of(label, name, "cross_attention", "pre", out, [query], attention=attention, norm=norm))
    up, down = linears(name, block, "mlp.c_fc", "mlp.c_proj")
    found.append(branch_of(f"{name}.mlp", name, "feed_forward", "pre", down, [up], norm=norm_of(name, block, "ln_2")))
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
        norm = norm_of(prefix, part, "layer_norm")
        if kind == "feed_forward":
            ups = ["wi_0", "wi_1"] if hasattr(part.DenseReluDense, "wi_0") else ["wi"]
            inputs = linears(prefix, part, *(f"DenseReluDense.{up}" for up in ups))
            output, attention = linear(prefix, part, "DenseReluDense.wo"), None
        else:
            path = "SelfAttention" if kind == "attention" else "EncDecAttention"
            query, key, value, output = linears(prefix, part, *(f"{path}.{letter}" for letter in "qkvo"))
            inputs = [query, key, value] if kind == "attention" else [query]
            owner = part.get_submodule(path)
            attention = attention_of(f"{prefix}.{path}", owner, query, key, value, scale=1.0)
        found.append(branch_of(prefix, name, kind, "pre", output, inputs, attention=attention, norm=norm))
    return found


def _t5_kind(part: nn.Module, word: str) -> bool:
    return any(name.endswith(word) for name in class_names(part))  # T5, MT5, UMT5


_POST = ("Bart", "Marian", "BlenderbotSmall", "PLBart")

_PRE = ("MBart", "Pegasus", "Whisper", "M2M100", "Blenderbot", "Speech2Text")


def bart(name: str, block: nn.Module) -> list[Branch] | None:
    """BART, Marian and the models that took over their layer, some of which moved the norms to the front."""
    own = [f"self_attn.{word}" for word in ("q_proj", "k_proj", "v_proj", "out_proj")]
    other = [f"encoder_attn.{word}" for word in ("q_proj", "k_proj", "v_proj", "out_proj")]
    has_cross = isinstance(getattr(block, "encoder_attn", None), nn.Module)
    parts = [*own, "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    parts += [*other, "encoder_attn_layer_norm"] if has_cross else []
    families = {word.removesuffix("EncoderLayer").removesuffix("DecoderLayer") for word in class_names(block)}
    if not families & {*_POST, *_PRE} or not has_only(block, *parts):
        return None
    placement: Placement = "post" if families & set(_POST) else "pre"
    taps = [Tap(block, keyword="hidden_states"), Tap(block.get_submodule("self_attn_layer_norm"), leaves=True)]
    query, key, value, out = linears(name, block, *own)
    found = [
        branch_of(
            f"{name}.self_attn",
            name,
            "attention",
            placement,
            out,
            [query, key, value],
            attention=attention_of(f"{name}.self_attn", block.get_submodule("self_attn"), query, key, value),
            norm=norm_of(name, block, "self_attn_layer_norm"),
            taps=(taps[0],),
        )
    ]
    if has_cross:
        query, key, value, out = linears(name, block, *other)
        norm = norm_of(name, block, "encoder_attn_layer_norm")
        found.append(
            branch_of(
                f"{name}.encoder_attn",
                name,
                "cross_attention",
                placement,
                out,
                [query],
                attention=attention_of(f"{name}.encoder_attn", block.get_submodule("encoder_attn"), query, key, value),
                norm=norm,
                taps=(taps[1],),
            )
        )
        taps.append(Tap(norm.module, leaves=True))
    up, down = linears(name, block, "fc1", "fc2")
    norm = norm_of(name, block, "final_layer_norm")
    # Without an encoder's output cross-attention is skipped: then the stream comes from the first norm.
    found.append(branch_of(f"{name}.fc2", name, "feed_forward", placement, down, [up], norm=norm, taps=tuple(taps[1:])))
    return found
