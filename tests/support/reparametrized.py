"""Small models to reparametrize, what they are called with, and what is asked of them afterwards."""

from functools import partial

import torch
from torch import nn

from tameformer.models.decoder import DecoderConfig, decoder
from tameformer.stabilizers.sigma_reparam import SigmaReparam

TOKENS = torch.arange(2 * 6).view(2, 6) % 13


def torch_encoder(**settings):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not settings)


def vectors(*shape):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.get_default_dtype())
    return values.mul(12.9898).sin().view(shape)


def on_vectors(model):
    return model(vectors(2, 5, 16))


def torch_transformer():
    return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(
        BertConfig(
            vocab_size=13, max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
        ),
        add_pooling_layer=False,
    )


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, **none))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 13}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def marian():
    from transformers import MarianConfig, MarianMTModel

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    return MarianMTModel(
        MarianConfig(
            vocab_size=13,
            d_model=16,
            max_position_embeddings=8,
            pad_token_id=12,
            decoder_start_token_id=0,
            **sides,
            **heads,
        )
    )


FAMILIES = {
    "ours": (
        lambda: decoder(DecoderConfig(num_layers=2, dim=16, num_heads=2, max_length=8, dropout=0.0), vocab_size=13),
        lambda model: model(TOKENS),
    ),
    "torch encoder": (torch_encoder, on_vectors),
    "torch encoder, Pre-norm": (partial(torch_encoder, norm_first=True), on_vectors),
    "torch transformer": (torch_transformer, lambda model: model(vectors(2, 3, 16), vectors(2, 4, 16))),
    "BERT": (bert, lambda model: model(TOKENS).last_hidden_state),
    "ViT": (vit, lambda model: model(vectors(2, 3, 8, 8)).last_hidden_state),
    "GPT-2": (gpt2, lambda model: model(TOKENS).logits),
    "Llama": (llama, lambda model: model(TOKENS).logits),
    "T5": (t5, lambda model: model(TOKENS, decoder_input_ids=TOKENS).logits),
    "Marian": (marian, lambda model: model(TOKENS, decoder_input_ids=TOKENS).logits),
}


def mlp():
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def members(model):
    return [module for module in model.modules() if isinstance(module, SigmaReparam)]


def train(model, steps, run=lambda model: model(torch.linspace(-1, 1, 18).view(3, 6)), **settings):
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **settings})
    for _ in range(steps):
        run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def spectral_norm(weight):
    return torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
