"""Hugging Face transformers, each with eager and with fused attention, and timm."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.family import LEFT, REAL, Family, Kind, Layers, Sum, noise, tokens

BERT_SUMS: tuple[Sum, ...] = tuple(
    (name, f"{name}.dense", f"{name}.LayerNorm") for name in ("attention.output", "output")
)
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CODER = {
    "vocab_size": 60,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
IMAGES = {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
AUDIO_REAL = torch.arange(20) < torch.tensor([[12], [20]])


def hugging_face(
    name: str, model: str, settings: Mapping[str, Any], inputs: Any, *layers: Layers, **more: Any
) -> list[Family]:
    """The family with eager attention, and with the fused one."""

    def build(attention: str) -> nn.Module:
        import transformers

        config_class = getattr(transformers, model).config_class
        config = config_class(**settings, attn_implementation=attention)
        config.use_cache = False
        return getattr(transformers, model)(config)

    return [
        Family(f"{name}-{attention}", lambda attention=attention: build(attention), inputs, layers, **more)
        for attention in ("eager", "sdpa")
    ]


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(7), "attention_mask": REAL.long()}


def text_pairs() -> dict[str, Tensor]:
    return {**text(), "decoder_input_ids": tokens(5)}


def pre_norm(
    name: str, attention: str, feed_forward: str, *, kind: Kind = "self", activation: str | None = None
) -> Layers:
    sums = ((attention, attention, None), (feed_forward, feed_forward, None))
    return Layers(name, {attention: kind}, sums, feed_forward if activation is None else activation)


def coder_layers(name: str, *, cross: bool, pre: bool) -> Layers:
    """BART, Marian and Whisper."""
    attention: dict[str, Kind] = {"self_attn": "causal", "encoder_attn": "cross"} if cross else {"self_attn": "self"}
    sums: list[Sum] = [(part, part, None if pre else f"{part}_layer_norm") for part in attention]
    sums.append((f"branch_{len(sums) + 1}", "fc2", None if pre else "final_layer_norm"))
    return Layers(name, attention, tuple(sums), "")


def coder(*, pre: bool) -> tuple[Layers, Layers]:
    return (
        coder_layers("model.encoder.layers", cross=False, pre=pre),
        coder_layers("model.decoder.layers", cross=True, pre=pre),
    )


def t5_layers(name: str, *, cross: bool) -> Layers:
    attention: dict[str, Kind] = {"layer.0.SelfAttention": "causal" if cross else "self"}
    if cross:
        attention["layer.1.EncDecAttention"] = "cross"
    last = f"layer.{len(attention)}"
    branches = [*attention, f"{last}.DenseReluDense"]
    sums: tuple[Sum, ...] = tuple((f"layer.{index}", branch, None) for index, branch in enumerate(branches))
    return Layers(name, attention, sums, f"{last}.DenseReluDense")


HUGGING_FACE = [
    *hugging_face(
        "bert",
        "BertForSequenceClassification",
        {**WIDTHS, "vocab_size": 60, "num_labels": 3},
        text,
        Layers("bert.encoder.layer", {"attention.self": "self"}, BERT_SUMS, "intermediate"),
        real=REAL,
    ),
    *hugging_face(
        "roberta",
        "RobertaForMaskedLM",
        {**WIDTHS, "vocab_size": 60, "max_position_embeddings": 20},
        text,
        Layers("roberta.encoder.layer", {"attention.self": "self"}, BERT_SUMS, "intermediate"),
        real=REAL,
    ),
    *hugging_face(
        "distilbert",
        "DistilBertForSequenceClassification",
        {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "num_labels": 3},
        text,
        Layers(
            "distilbert.transformer.layer",
            {"attention": "self"},
            (("attention", "attention.out_lin", "sa_layer_norm"), ("ffn", "ffn", "output_layer_norm")),
            "ffn",
        ),
        real=REAL,
    ),
    *hugging_face(
        "vit",
        "ViTForImageClassification",
        {**WIDTHS, **IMAGES, "num_labels": 3},
        lambda: {"pixel_values": noise(2, 3, 8, 8)},
        pre_norm("vit.layers", "attention", "mlp"),
    ),
    *hugging_face(
        "deit",
        "DeiTForImageClassification",
        {**WIDTHS, **IMAGES, "num_labels": 3},
        lambda: {"pixel_values": noise(2, 3, 8, 8)},
        pre_norm("deit.layers", "attention", "mlp"),
    ),
    *hugging_face(
        "gpt2",
        "GPT2LMHeadModel",
        {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2},
        lambda: {"input_ids": tokens(7), "attention_mask": LEFT.long()},
        pre_norm("transformer.h", "attn", "mlp", kind="causal"),
        real=LEFT,
    ),
    *hugging_face(
        "llama",
        "LlamaForCausalLM",
        {**WIDTHS, "vocab_size": 60, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.1},
        text,
        pre_norm("model.layers", "self_attn", "mlp", kind="causal"),
        heads=4,
        real=REAL,
    ),
    *hugging_face(
        "t5",
        "T5ForConditionalGeneration",
        {"vocab_size": 60, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        text_pairs,
        t5_layers("encoder.block", cross=False),
        t5_layers("decoder.block", cross=True),
        real=REAL,
    ),
    *hugging_face("bart", "BartForConditionalGeneration", CODER, text_pairs, *coder(pre=False), real=REAL),
    *hugging_face("marian", "MarianMTModel", CODER, text_pairs, *coder(pre=False), real=REAL),
    *hugging_face(
        "whisper",
        "WhisperForConditionalGeneration",
        {**CODER, "max_source_positions": 10, "num_mel_bins": 8, "max_target_positions": 16},
        lambda: {"input_features": noise(2, 8, 20), "decoder_input_ids": tokens(5)},
        *coder(pre=True),
    ),
    *hugging_face(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {
            **WIDTHS,
            "vocab_size": 12,
            "conv_dim": (16, 16),
            "conv_kernel": (4, 4),
            "conv_stride": (4, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "mask_time_prob": 0.0,
            "layerdrop": 0.0,
        },
        lambda: {
            "input_values": noise(2, 320),
            "attention_mask": (torch.arange(320) < torch.tensor([[200], [320]])).long(),
        },
        Layers(
            "wav2vec2.encoder.layers",
            {"attention": "self"},
            (("attention", "attention", "layer_norm"), ("feed_forward", "feed_forward", "final_layer_norm")),
            "feed_forward",
        ),
        real=AUDIO_REAL,
        unseen=("wav2vec2.encoder.pos_conv_embed.conv.weight",),
    ),
]


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    return timm.models.VisionTransformer(**settings, num_classes=5, proj_drop_rate=0.1, attn_drop_rate=0.1)


TIMM = Family("timm-vit", timm_vit, lambda: {"x": noise(2, 3, 8, 8)}, (pre_norm("blocks", "attn", "mlp"),))
