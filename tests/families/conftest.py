"""Every family of models that the probes work on, tiny, with what is to be seen in it. Names are those of its modules."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer import models
from tameformer.probes import Watch, default_probes

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


# torch.nn, and modules of anyone


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


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def tokens(length: int) -> Tensor:
    return torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(length))


REAL = torch.arange(7) < torch.tensor([[5], [7]])
LEFT = REAL.flip(1)
FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)
STREAM = ("log_partition",)
"""Unseen where a model ends with its stream."""


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


# Ours


def our_layers(name: str, residual: str = "pre", *, cross: bool = False, kind: Kind = "self") -> Layers:
    parts = ["attention", *(["cross_attention"] if cross else []), "feed_forward"]
    branch = "out_norm" if residual == "peri" else "branch"
    sums = tuple((part, f"{part}.{branch}", f"{part}.norm" if residual == "post" else None) for part in parts)
    attention: dict[str, Kind] = {"attention.branch": kind, **({"cross_attention.branch": "cross"} if cross else {})}
    return Layers(name, attention, sums, "feed_forward.branch")


OURS: dict[str, Any] = {"dim": 16, "num_heads": 2, "hidden_dim": 32, "dropout": 0.1, "attention_dropout": 0.1}
VISION = models.VisionConfig(num_layers=2, patch_size=4, **OURS)


def our_encoder(residual: Any) -> Family:
    config = models.EncoderConfig(num_layers=2, max_length=7, residual=residual, **OURS)
    return Family(
        f"encoder-{residual}",
        lambda: models.encoder(config, vocab_size=60),
        lambda: {"tokens": tokens(7), "real": REAL},
        (our_layers("stack.layers", residual),),
        real=REAL,
        unseen=STREAM,
    )


def our_decoder() -> nn.Module:
    settings: dict[str, Any] = {**OURS, "num_heads": 4, "num_kv_heads": 2, "positions": "rotary", "norm": "rms_norm"}
    config = models.DecoderConfig(num_layers=2, max_length=7, activation="swiglu", drop_path=0.1, **settings)
    return models.decoder(config, vocab_size=60)


def our_encoder_decoder() -> nn.Module:
    config = models.EncoderDecoderConfig(num_encoder_layers=2, num_decoder_layers=2, max_length=7, **OURS)
    return models.encoder_decoder(config, vocab_size=60, padding_id=0)


def our_sources() -> Tensor:
    return tokens(7).masked_fill(~REAL, 0)


TAME = [
    *map(our_encoder, ("pre", "post", "peri", "none")),
    Family(
        "decoder", our_decoder, lambda: {"tokens": tokens(7)}, (our_layers("stack.layers", kind="causal"),), heads=4
    ),
    Family(
        "encoder-decoder",
        our_encoder_decoder,
        lambda: {"source": our_sources(), "target_in": tokens(5)},
        (our_layers("encoder.layers"), our_layers("decoder.layers", cross=True, kind="causal")),
        real=REAL,
    ),
    Family(
        "vision",
        lambda: models.vision_classifier(VISION, image_size=(8, 8), channels=3, num_classes=5),
        lambda: {"images": noise(2, 3, 8, 8)},
        (our_layers("stack.layers"),),
    ),
]


# Hugging Face

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

FAMILIES = {family.name: family for family in [*TORCH, *TAME, *HUGGING_FACE, TIMM]}


@pytest.fixture(params=FAMILIES)
def family(request):
    """Each family in its turn."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def families():
    """All families by name, for tests that cannot import a neighbour."""
    return FAMILIES


@pytest.fixture(scope="session")
def output_of():
    """`main_output`."""
    return main_output


@dataclass
class Trained:
    """What a run leaves."""

    losses: list[float]
    weights: list[Tensor]
    generator: Tensor
    readings: dict[int, dict[str, Tensor]]
    unseen: list[str]

    def same_run(self, other: "Trained") -> bool:
        """Equal to the bit."""
        return (
            self.losses == other.losses
            and all(torch.equal(a, b) for a, b in zip(self.weights, other.weights, strict=True))
            and torch.equal(self.generator, other.generator)
        )


def run_steps(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    watched: bool,
    steps: int = 4,
    micro_batches: int = 1,
    autocast: bool = False,
    sequences: int | None = 1,
) -> Trained:
    """Some steps of AdamW, every second one watched by all probes, and a check that they left nothing behind."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = Watch(
        model, [(p, 2) for p in default_probes(model, [optimizer])], optimizers=[optimizer], sequences=sequences
    )
    before = traces(model, optimizer)
    losses, readings = [], {}
    torch.manual_seed(1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        with watch.watching(step) if watched and watch.due(step) else contextlib.nullcontext():
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
                    loss = main_output(model(**inputs)).float().square().mean()
                loss.backward()
                losses.append(loss.item())
            optimizer.step()
        if watched and watch.due(step):
            readings[step] = {key: value.clone() for key, value in watch.read().items()}
            assert readings[step]
        assert traces(model, optimizer) == before
    weights = [getattr(p, "_local_tensor", p).detach().clone() for p in model.parameters()]
    return Trained(losses, weights, torch.get_rng_state(), readings, watch.unseen())


@pytest.fixture(scope="session")
def train():
    """`run_steps`."""
    return run_steps


def own_attributes(thing: Any) -> list[str]:
    """Without the marks that compilation makes."""
    return sorted(name for name in vars(thing) if not name.startswith("_dynamo"))


def traces(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that a watcher might leave on a model, an optimizer or in torch."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks += ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "hooks": {name: [list(vars(module)[hook]) for hook in hooks] for name, module in model.named_modules()},
        "attributes": {name: own_attributes(module) for name, module in model.named_modules()},
        "parameters": {
            name: [
                own_attributes(p),
                list(p._backward_hooks or []),
                list(p._post_accumulate_grad_hooks or []),
            ]
            for name, p in model.named_parameters()
        },
        "global": [list(getattr(nn.modules.module, f"_global{hook}")) for hook in hooks[:4]],
        "optimizer": [list(optimizer._optimizer_step_pre_hooks), list(optimizer._optimizer_step_post_hooks)],
        "modes": torch.overrides._get_current_function_mode_stack(),
        "grad": (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")),
        "stance": "default" if dynamo is None else dynamo._stance.stance,
    }


@pytest.fixture(scope="session")
def traces_of():
    """`traces`."""
    return traces
