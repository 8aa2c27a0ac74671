"""Pruned equals gated to zero, over every family that can be pruned."""

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tameformer as tame
from tameformer.errors import PatchError
from tameformer.models import DecoderConfig, EncoderDecoderConfig, decoder, encoder_decoder
from tameformer.patch.heads import gate_heads, head_importance, least_important, prune_heads

TOKENS = torch.arange(5, 19).view(2, 7)
SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 8}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def hugging_face(name, **settings):
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings))


def ours(**settings):
    return decoder(DecoderConfig(dim=16, num_heads=4, num_layers=2, max_length=16, **settings), vocab_size=30)


def bart():
    return hugging_face(
        "Bart", vocab_size=30, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=8, decoder_ffn_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=2, dropout=0.0,
    )  # fmt: skip


FAMILIES = {
    "pre": lambda: ours(),
    "post": lambda: ours(residual="post", positions="rotary"),
    "peri": lambda: ours(residual="peri"),
    "shaw": lambda: ours(positions="relative"),
    "windowed": lambda: ours(attention="windowed", radius=2),
    "bert": lambda: hugging_face("Bert", **SMALL, **STILL),
    "distilbert": lambda: hugging_face("DistilBert", vocab_size=30, dim=16, n_layers=2, n_heads=4, hidden_dim=8),
    "llama": lambda: hugging_face("Llama", **SMALL),
    "bart": bart,
}


def called(model):
    out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out[0]


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    made = FAMILIES[request.param]().eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)  # a bias of values goes through the head, too
    return made


@torch.no_grad()
def test_pruned_is_gated_to_zero_and_can_be_taken_back(model):
    before, state = called(model), copy.deepcopy(model.state_dict())
    kept = dict(model.named_parameters())
    with gate_heads(model) as gates:
        assert called(model).equal(before)
        chosen = {name: [1, 3] if i % 2 else [2] for i, name in enumerate(gates.names)}
        for gate, heads in zip(gates.new_parameters, chosen.values(), strict=True):
            gate[heads] = 0
        gated = called(model)
    assert not torch.allclose(gated, before)
    assert called(model).equal(before)
    handle = prune_heads(model, chosen)
    torch.testing.assert_close(called(model), gated, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) < sum(value.numel() for value in kept.values())
    assert handle.settings == {"heads": chosen}
    handle.remove()
    assert called(model).equal(before)
    assert [(name, id(p)) for name, p in model.named_parameters()] == [(name, id(p)) for name, p in kept.items()]
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@settings(max_examples=15)
@given(chosen=st.lists(st.sets(st.integers(0, 3), min_size=1, max_size=3), min_size=2, max_size=2))
def test_whichever_heads_are_pruned_they_are_gated_to_zero(chosen):
    torch.manual_seed(0)
    model = ours().double().eval()
    with gate_heads(model) as gates:
        heads = {name: sorted(some) for name, some in zip(gates.names, chosen, strict=True)}
        for gate, some in zip(gates.new_parameters, heads.values(), strict=True):
            gate[some] = 0
        gated = called(model)
    prune_heads(model, heads).bake()
    torch.testing.assert_close(called(model), gated, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_baked_gates_are_plain_weights(model):
    handle = gate_heads(model)
    for gate in handle.new_parameters:
        gate.uniform_(0, 2)
    expected = called(model)
    handle.bake()
    torch.testing.assert_close(called(model), expected, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pruned_layers_train_generate_and_are_probed():
    model = ours()
    handle = prune_heads(model, {"stack.layers.0.attention.branch": [0, 1, 2]})
    model(TOKENS).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    handle.bake()
    cache = model.new_cache()
    pieces = [model(piece, cache=cache) for piece in TOKENS.split([3, 4], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(TOKENS), rtol=1e-4, atol=1e-5)
    report = tame.diagnose(model, TOKENS)
    heads = [key for key in report.values if key.startswith("diag/attention_entropy/stack.layers.0")]
    assert len(heads) == 1


def test_whole_groups_only():
    model = ours(num_kv_heads=2).eval()
    name = "stack.layers.1.attention.branch"
    with pytest.raises(PatchError, match=r"keys that serve 2 heads each, which can be pruned together only, got \[1\]"):
        prune_heads(model, {name: [1]})
    with gate_heads(model) as gates, torch.no_grad():
        gates.new_parameters[1][:2] = 0
        expected = model(TOKENS)
    prune_heads(model, {name: [0, 1]})
    torch.testing.assert_close(model(TOKENS), expected)


def test_importance_is_the_mean_of_the_gates_slopes():
    torch.manual_seed(0)
    model = ours().double().eval()
    batches = [TOKENS, TOKENS[:1] + 1]

    def loss(model, tokens):
        signs = 1.0 - 2 * (tokens[:, 0] % 2)  # slopes of examples that cancel in a sum
        return (signs * model(tokens).square().mean((1, 2))).mean()

    found = head_importance(model, batches, loss)
    assert all(p.grad is None for p in model.parameters())
    expected = {}
    examples = [row[None] for batch in batches for row in batch]
    with gate_heads(model) as gates:
        for example in examples:
            slopes = torch.autograd.grad(loss(model, example), gates.new_parameters)
            for name, slope in zip(gates.names, slopes, strict=True):
                expected[name] = expected.get(name, 0) + slope.abs() / len(examples)
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values / values.norm())


def test_an_unused_head_is_the_first_to_go():
    torch.manual_seed(0)
    model = ours()
    with torch.no_grad():
        model.stack.layers[1].attention.branch.out.weight[:, 8:12] = 0
    importance = head_importance(model, [TOKENS], lambda model, batch: model(batch).square().mean())
    assert least_important(importance, 1) == {"stack.layers.1.attention.branch": [2]}
    with pytest.raises(ValueError, match="but 3 more were to be pruned"):
        least_important(importance, 9)


def test_cross_attention_is_pruned_too():
    config = EncoderDecoderConfig(dim=16, num_heads=4, num_encoder_layers=1, num_decoder_layers=1)
    model = encoder_decoder(config, vocab_size=30, padding_id=0).eval()
    name = "decoder.layers.0.cross_attention.branch"
    with gate_heads(model) as gates, torch.no_grad():
        gates.new_parameters[gates.names.index(name)][1] = 0
        expected = model(TOKENS, TOKENS)
    prune_heads(model, {name: [1]})
    torch.testing.assert_close(model(TOKENS, TOKENS), expected)


@pytest.mark.parametrize(
    ("make", "heads", "message"),
    [
        (ours, {"nowhere": [0]}, "expected the name of an attention, got nowhere; there are stack.layers.0"),
        (ours, {"stack.layers.0.attention.branch": [4]}, r"has the heads 0..3, got \[4\]"),
        (ours, {"stack.layers.0.attention.branch": [0, 1, 2, 3]}, "would have no head left"),
        (
            lambda: ours(positions="alibi"),
            {"stack.layers.0.attention.branch": [0]},
            "relative holds something for each head",
        ),
        (
            lambda: hugging_face("GPT2", vocab_size=30, n_embd=16, n_layer=1, n_head=4),
            {"h.0.attn": [0]},
            "no linear layer of",
        ),
        (
            lambda: hugging_face("T5", vocab_size=30, d_model=16, num_layers=1, num_heads=4, d_kv=4, d_ff=8),
            {"encoder.block.0.layer.0.SelfAttention": [0]},
            "adds a bias for each head",
        ),
        (
            lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 8, batch_first=True), 1),
            {"layers.0.self_attn": [0]},
            "which never calls its output projection",
        ),
    ],
)
def test_what_cannot_be_pruned_is_refused_and_left_alone(make, heads, message):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PatchError, match=message):
        prune_heads(model, heads)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_patched_projections_are_refused():
    model = ours()
    tame.sigma_reparam(model)
    with pytest.raises(PatchError, match="fused or patched"):
        prune_heads(model, {"stack.layers.0.attention.branch": [0]})
