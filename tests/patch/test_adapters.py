"""The adapters against what a forward pass shows, for every family that they know."""

import pytest
import torch
import transformers
from torch import nn

from tameformer.errors import PatchError
from tameformer.models import (
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    VisionConfig,
    decoder,
    encoder,
    encoder_decoder,
    vision_classifier,
)
from tameformer.patch import Observation, Observer
from tameformer.patch.adapters import branches, num_branches, num_layers, stacks

IDS = torch.arange(5, 19).view(2, 7)
SMALL = {"dim": 16, "num_heads": 2}
HF = {"vocab_size": 50, "attn_implementation": "eager"}
BERT = {**HF, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, **HF, "dropout": 0.0}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0}
BART |= {
    "decoder_start_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "forced_eos_token_id": 2,
}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
STREAM, TARGET = torch.linspace(-3, 9, 224).sin().view(2, 7, 16), torch.linspace(-3, 8, 160).cos().view(2, 5, 16)


def ours(residual, activation="gelu"):
    config = EncoderConfig(num_layers=2, residual=residual, activation=activation, **SMALL)
    return encoder(config, vocab_size=50), {"tokens": IDS}


def torch_stack(norm_first, batch_first=True):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": STREAM}


def hugging_face(config, model, **inputs):
    return getattr(transformers, model)(getattr(transformers, config[0])(**config[1])), inputs


def gpt2(cross=False):
    config = {"n_embd": 16, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "use_cache": False, **HF}
    config |= {"embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1, "add_cross_attention": cross}
    inputs = {"encoder_hidden_states": STREAM} if cross else {}
    return hugging_face(("GPT2Config", config), "GPT2Model", input_ids=IDS, **inputs)


def bert(cross=False):
    config = {**BERT, "is_decoder": cross, "add_cross_attention": cross, "use_cache": False}
    inputs = {"encoder_hidden_states": STREAM} if cross else {}
    return hugging_face(("BertConfig", config), "BertModel", input_ids=IDS, **inputs)


def llama():
    config = {**HF, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config |= {"intermediate_size": 32, "use_cache": False}
    return hugging_face(("LlamaConfig", config), "LlamaModel", input_ids=IDS)


def t5():
    config = {
        "vocab_size": 50,
        "d_model": 16,
        "num_layers": 2,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 32,
        "use_cache": False,
    }
    config |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return hugging_face(("T5Config", config), "T5Model", input_ids=IDS, decoder_input_ids=IDS)


def vit(name):
    config = {key: value for key, value in BERT.items() if key != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    return hugging_face((f"{name}Config", config), f"{name}Model", pixel_values=IMAGE)


def two_sided(name):
    return hugging_face((f"{name}Config", BART), f"{name}Model", input_ids=IDS, decoder_input_ids=IDS)


def distilbert():
    config = {**HF, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    return hugging_face(("DistilBertConfig", config), "DistilBertModel", input_ids=IDS)


def our_pair():
    config = EncoderDecoderConfig(num_encoder_layers=2, num_decoder_layers=2, residual="post", **SMALL)
    return encoder_decoder(config, vocab_size=50, padding_id=0), {"source": IDS, "target_in": IDS}


def our_decoder():
    config = DecoderConfig(num_layers=2, num_kv_heads=1, activation="swiglu", norm="rms_norm", **SMALL)
    return decoder(config, vocab_size=50), {"tokens": IDS}


def our_vision():
    config = VisionConfig(num_layers=2, residual="post", **SMALL)
    return vision_classifier(config, num_classes=3, image_size=8, channels=3), {"images": IMAGE}


def torch_pair():
    model = nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=True)
    return model, {"src": STREAM, "tgt": TARGET}


FAMILIES = {
    **{
        f"ours-{placement}": (lambda placement=placement: ours(placement))
        for placement in ("pre", "post", "peri", "none")
    },
    "ours-decoder": our_decoder,
    "ours-pair": our_pair,
    "ours-vision": our_vision,
    "torch-post": lambda: torch_stack(False),
    "torch-pre": lambda: torch_stack(True),
    "torch-pair": torch_pair,
    "bert": bert,
    "bert-cross": lambda: bert(cross=True),
    "roberta": lambda: hugging_face(("RobertaConfig", BERT), "RobertaModel", input_ids=IDS),
    "distilbert": distilbert,
    "vit": lambda: vit("ViT"),
    "deit": lambda: vit("DeiT"),
    "gpt2": gpt2,
    "gpt2-cross": lambda: gpt2(cross=True),
    "llama": llama,
    "t5": t5,
    "bart": lambda: two_sided("Bart"),
    "mbart": lambda: two_sided("MBart"),
    "marian": lambda: two_sided("Marian"),
}


class Sums(Observer):
    def __init__(self):
        self.seen = []

    def on_branch(self, layer, residual, branch):
        self.seen.append((residual.clone(), branch.clone()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_branches_are_what_a_forward_pass_adds(family):
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    found, sums, results = branches(model), Sums(), {}
    modules = dict(model.named_modules())
    for branch in found:
        assert modules[branch.output.name] is branch.output.module
        assert branch.norm is None or modules[branch.norm.name] is branch.norm.module
        assert all(modules[matrix.name] is matrix.module for matrix in branch.inputs)
        assert branch.dim == 16
        branch.result.register_forward_hook(
            lambda module, args, out, name=branch.name: results.update(
                {name: (out[0] if isinstance(out, tuple) else out).detach()}
            )
        )
    with Observation(model, [sums]).watching():
        model(**inputs)
    branches_a_layer = {
        name: 3 if any(b.kind == "cross_attention" for b in stack) else 2 for name, stack in stacks(found).items()
    }
    assert len(sums.seen) == len(found) == 2 * sum(branches_a_layer.values())
    assert list(results) == [branch.name for branch in found]
    for branch, (_, added) in zip(found, sums.seen, strict=True):
        torch.testing.assert_close(added, results[branch.name], rtol=0, atol=0)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("ours-none", "ours-peri")])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_placement_is_what_a_forward_pass_shows(family):
    """A post-norm reads the sum; a pre-norm reads the residual."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    found, sums, read = branches(model), Sums(), {}
    for branch in found:
        branch.norm.module.register_forward_pre_hook(
            lambda module, args, name=branch.name: read.update({name: args[0].detach()})
        )
    with Observation(model, [sums]).watching():
        model(**inputs)
    for branch, (residual, added) in zip(found, sums.seen, strict=True):
        expected = residual + added if branch.placement == "post" else residual
        assert branch.placement in ("pre", "post")
        torch.testing.assert_close(read[branch.name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["ours-pair", "torch-pair", "bert-cross", "gpt2-cross", "t5", "marian"])
def test_cross_attention_reads_the_stream_with_its_query_only(family):
    cross = [branch for branch in branches(FAMILIES[family]()[0]) if branch.kind == "cross_attention"]
    assert len(cross) == 2
    assert all(len(branch.inputs) == 1 and branch.value not in branch.inputs for branch in cross)


class Calls(Observer):
    def __init__(self):
        self.seen = {}

    def on_attention(self, call):
        self.seen[call.layer] = call


def attention_calls(model, inputs):
    calls = Calls()
    with Observation(model, [calls], sequences=None).watching():
        model(**inputs)
    return calls.seen


def double(matrix, start, stop):
    """Twice the outputs from `start` to `stop`."""
    matrix.view()[start:stop] *= 2
    if matrix.bias is not None:
        getattr(matrix.module, matrix.bias)[matrix.start : matrix.stop][start:stop] *= 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_the_heads_are_what_a_call_of_attention_shows(family):
    """Twice a head's outputs are twice that head's queries or keys, bit for bit, and no other's."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    model.train()  # in evaluation torch's layers fuse
    if isinstance(model, transformers.PreTrainedModel):
        model.set_attn_implementation("sdpa")
    for parameter in model.parameters():  # so that biases take part
        parameter.add_(torch.randn_like(parameter) * 0.1)
    found = [branch.attention for branch in branches(model) if branch.kind != "feed_forward"]
    assert found
    for attention in found:
        torch.manual_seed(1)
        before = attention_calls(model, inputs)[attention.name]
        assert (attention.num_heads, attention.head_dim) == (before.query.shape[1], before.query.shape[3])
        scale = before.query.shape[-1] ** -0.5 if before.scale is None else before.scale
        assert attention.scale == pytest.approx(scale)
        last = attention.num_kv_heads - 1
        double(attention.query, 0, attention.head_dim)
        double(attention.key, last * attention.head_dim, None)
        torch.manual_seed(1)
        after = attention_calls(model, inputs)[attention.name]
        served = before.key.shape[1] // attention.num_kv_heads  # more than 1 where the model repeats the keys itself
        query_factor = torch.tensor([2.0] + [1.0] * (attention.num_heads - 1)).view(-1, 1, 1)
        key_factor = torch.tensor([1.0] * last * served + [2.0] * served).view(-1, 1, 1)
        assert torch.equal(after.query, before.query * query_factor)
        assert torch.equal(after.key, before.key * key_factor)
        assert torch.equal(after.value, before.value)


def test_a_fused_projection_is_read_in_its_three_parts():
    for model in (gpt2()[0], torch_stack(True)[0]):
        attention = branches(model)[0]
        weight = getattr(attention.value.module, attention.value.weight)
        stored = weight.T if attention.value.is_transposed else weight
        assert [matrix.view().shape for matrix in attention.inputs] == [(16, 16)] * 3
        torch.testing.assert_close(torch.cat([m.view() for m in attention.inputs]), stored)
        assert attention.value.view().data_ptr() == stored[32:].data_ptr()


def test_layers_are_counted_by_how_often_they_run():
    model, _ = ours("pre")
    model.stack.layers.append(model.stack.layers[0])
    found = branches(model)
    assert (len(found), num_branches(found), num_layers(found)) == (4, 6, 3)
    assert {branch.uses for branch in found} == {1, 2}


class Changed(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return 2 * super().forward(src, src_mask, src_key_padding_mask, is_causal)


def test_layers_that_we_do_not_know_are_named():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    with pytest.raises(PatchError, match=r"ModuleList has nothing to change.*BERT, RoBERTa.*found Sequential"):
        branches(layers)
    with pytest.raises(PatchError, match="found Changed"):
        branches(nn.TransformerEncoder(Changed(8, 2, 16), 1, enable_nested_tensor=False))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_model_is_looked_into():
    model, _ = ours("pre")
    assert [b.name for b in branches(torch.compile(model))] == [b.name for b in branches(model)]
