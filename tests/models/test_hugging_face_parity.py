"""Weights copied from tiny Hugging Face models built from a configuration; whole outputs compared in float64.

The names are those of transformers 5.23.
"""

import pytest
import torch
from torch import nn

from tameformer.models import (
    DecoderConfig,
    EncoderDecoderConfig,
    VisionConfig,
    beam_search,
    decoder,
    decoder_steps,
    encoder_decoder,
    greedy,
    translation_steps,
    vision_classifier,
)

transformers = pytest.importorskip("transformers", reason="the weights to compare with are from transformers")

VOCAB = 50  # padded to 64 rows in our models


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def randomized(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def set_norm_epsilon(model: nn.Module, epsilon: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.eps = epsilon


def load_renamed(ours: nn.Module, theirs: dict[str, torch.Tensor], names: dict[str, str]) -> None:
    """Copies into `ours` the weights that `names` maps to it; every weight of `ours` must be named."""
    state = {}
    for name, tensor in theirs.items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = tensor
    for name, own in ours.state_dict().items():
        if name.endswith(("embedding.weight", "head.weight")) and own.shape[0] == 64:
            state[name] = torch.cat([state[name], torch.full((64 - VOCAB, own.shape[1]), 7.0)])  # must not matter
    ours.load_state_dict({name: state[name] for name in ours.state_dict()}, strict=True)


def test_vit():
    theirs = randomized(
        transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=24,
                image_size=(8, 12),
                patch_size=4,
                num_channels=3,
                num_labels=5,
            )
        )
    )
    config = VisionConfig(dim=16, num_layers=2, num_heads=4, hidden_dim=24, patch_size=4)
    ours = vision_classifier(config, num_classes=5, image_size=(8, 12), channels=3).eval()
    set_norm_epsilon(ours, theirs.config.layer_norm_eps)
    state = theirs.state_dict()
    state["vit.embeddings.cls_token"] = state["vit.embeddings.cls_token"].flatten()
    state["vit.embeddings.position_embeddings"] = state["vit.embeddings.position_embeddings"][0]
    projection = "vit.embeddings.patch_embeddings.projection"
    state[f"{projection}.weight"] = state[f"{projection}.weight"].flatten(1)
    names = {
        "vit.embeddings.cls_token": "pooling.token",
        "vit.embeddings.position_embeddings": "positions.table",
        projection: "stem.project",
        "vit.layernorm": "stack.norm",
        "vit.layers": "stack.layers",
        "attention.q_proj": "attention.branch.query",
        "attention.k_proj": "attention.branch.key",
        "attention.v_proj": "attention.branch.value",
        "attention.o_proj": "attention.branch.out",
        "layernorm_before": "attention.norm",
        "layernorm_after": "feed_forward.norm",
        "mlp.fc1": "feed_forward.branch.up",
        "mlp.fc2": "feed_forward.branch.down",
        "classifier": "head",
    }
    load_renamed(ours, state, names)
    images = torch.randn(3, 3, 8, 12)
    torch.testing.assert_close(ours(images), theirs(images).logits, rtol=1e-10, atol=1e-10)


def gpt2() -> tuple[nn.Module, nn.Module]:
    theirs = randomized(
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=4,
                n_inner=24,
                vocab_size=VOCAB,
                n_positions=16,
                activation_function="gelu",
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    )
    ours = decoder(DecoderConfig(dim=16, num_layers=2, num_heads=4, hidden_dim=24, max_length=16), vocab_size=VOCAB)
    state = {}
    for name, tensor in theirs.state_dict().items():
        if "c_attn" in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3, dim=-1), strict=True):
                state[name.replace("c_attn", part)] = rows.T if rows.ndim == 2 else rows
        else:
            state[name] = tensor.T if "c_" in name and tensor.ndim == 2 else tensor
    names = {
        "transformer.wte": "embedding",
        "transformer.wpe.weight": "positions.table",
        "transformer.ln_f": "stack.norm",
        "transformer.h": "stack.layers",
        "attn.c_proj": "attention.branch.out",
        "attn.query": "attention.branch.query",
        "attn.key": "attention.branch.key",
        "attn.value": "attention.branch.value",
        "mlp.c_fc": "feed_forward.branch.up",
        "mlp.c_proj": "feed_forward.branch.down",
        "ln_1": "attention.norm",
        "ln_2": "feed_forward.norm",
    }
    load_renamed(ours, state, names)
    return ours.eval(), theirs


def test_gpt2():
    ours, theirs = gpt2()
    tokens = torch.randint(0, VOCAB, (3, 16))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-10, atol=1e-10)


def test_gpt2_continues_greedily_with_the_same_tokens():
    ours, theirs = gpt2()
    prompt = torch.randint(0, VOCAB, (3, 4))
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert greedy(decoder_steps(ours, prompt), max_new_tokens=12).equal(expected[:, 4:])


@pytest.mark.parametrize("tied", [True, False])
def test_llama_with_shared_key_value_heads(tied):
    theirs = randomized(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                intermediate_size=24,
                vocab_size=VOCAB,
                max_position_embeddings=16,
                tie_word_embeddings=tied,
            )
        )
    )
    config = DecoderConfig(
        dim=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        hidden_dim=24,
        norm="rms_norm",
        activation="swiglu",
        positions="rotary",
        bias=False,
        max_length=16,
        tie_embeddings=tied,
    )
    ours = decoder(config, vocab_size=VOCAB).eval()
    names = {
        "model.embed_tokens": "embedding",
        "model.norm": "stack.norm",
        "model.layers": "stack.layers",
        "self_attn.q_proj": "attention.branch.query",
        "self_attn.k_proj": "attention.branch.key",
        "self_attn.v_proj": "attention.branch.value",
        "self_attn.o_proj": "attention.branch.out",
        "post_attention_layernorm": "feed_forward.norm",
        "input_layernorm": "attention.norm",
        "mlp.gate_proj": "feed_forward.branch.gate",
        "mlp.up_proj": "feed_forward.branch.up",
        "mlp.down_proj": "feed_forward.branch.down",
        "lm_head": "head",
    }
    load_renamed(ours, theirs.state_dict(), names)
    tokens = torch.randint(0, VOCAB, (3, 16))
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=2e-6)  # their norms and turns are in fp32


def marian() -> tuple[nn.Module, nn.Module]:
    theirs = randomized(
        transformers.MarianMTModel(
            transformers.MarianConfig(
                d_model=16,
                encoder_layers=2,
                decoder_layers=3,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                vocab_size=VOCAB,
                max_position_embeddings=16,
                scale_embedding=True,
                activation_function="relu",
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
                decoder_start_token_id=2,
                forced_eos_token_id=None,
                num_beams=1,
            )
        )
    )
    config = EncoderDecoderConfig(
        dim=16,
        num_encoder_layers=2,
        num_decoder_layers=3,
        num_heads=4,
        hidden_dim=24,
        residual="post",
        activation="relu",
        positions="learned",  # their sines stand in another order, so the table is copied
        max_length=16,
    )
    ours = encoder_decoder(config, vocab_size=VOCAB, padding_id=0)
    names = {
        "model.shared": "embedding",
        "model.encoder.embed_positions.weight": "source_positions.table",
        "model.decoder.embed_positions.weight": "target_positions.table",
        "model.": "",
        "self_attn_layer_norm": "attention.norm",
        "encoder_attn_layer_norm": "cross_attention.norm",
        "final_layer_norm": "feed_forward.norm",
        "self_attn.": "attention.branch.",
        "encoder_attn.": "cross_attention.branch.",
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "out_proj": "out",
        "fc1": "feed_forward.branch.up",
        "fc2": "feed_forward.branch.down",
    }
    load_renamed(ours, theirs.state_dict(), names)
    return ours.eval(), theirs


def marian_batch() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randint(2, VOCAB, (3, 9))
    source[1, 6:], source[2, 2:] = 0, 0
    return source, torch.randint(2, VOCAB, (3, 7))


def test_marian():
    ours, theirs = marian()
    source, target_in = marian_batch()
    expected = theirs(input_ids=source, attention_mask=source != 0, decoder_input_ids=target_in).logits
    torch.testing.assert_close(ours(source, target_in), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_marian_translates_with_the_same_tokens(num_beams):
    ours, theirs = marian()
    source, _ = marian_batch()
    expected = theirs.generate(
        input_ids=source,
        attention_mask=source != 0,
        max_new_tokens=12,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=VOCAB + 1,  # none ends, so length penalties play no part
        pad_token_id=0,
        bad_words_ids=None,
    )[:, 1:]
    steps = translation_steps(ours, source, start_id=2)
    if num_beams == 1:
        assert greedy(steps, max_new_tokens=12).equal(expected)
    else:
        tokens, _ = beam_search(steps, num_beams=num_beams, max_new_tokens=12, end_id=VOCAB + 1, length_penalty=0.0)
        assert tokens.equal(expected)
