"""Baked, a model of Hugging Face is saved and loaded by the library's own means, with the same outputs."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MarianConfig,
    MarianModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from tameformer.stabilizers import METHODS, stabilize

TOKENS = torch.arange(3, 17).view(2, 7)
TEXT, PAIR = {"input_ids": TOKENS}, {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(1)}
IMAGES = {"pixel_values": torch.linspace(-3, 9, 384).sin().view(2, 3, 8, 8)}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIDES = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
}
SMALL = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
FAMILIES = {
    "bert": (lambda: BertModel(BertConfig(**SMALL, **ENCODER)), TEXT),
    "gpt2": (lambda: GPT2Model(GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=16)), TEXT),
    "llama": (lambda: LlamaModel(LlamaConfig(**SMALL, **ENCODER)), TEXT),
    "t5": (lambda: T5Model(T5Config(**SMALL, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)), PAIR),
    "marian": (
        lambda: MarianModel(
            MarianConfig(**SMALL, d_model=16, **SIDES, decoder_start_token_id=0, forced_eos_token_id=1)
        ),
        PAIR,
    ),
    "vit": (lambda: ViTModel(ViTConfig(image_size=8, patch_size=4, **ENCODER), add_pooling_layer=False), IMAGES),
}
POST_NORM = ("bert", "marian")
CASES = [
    *((family, "sigma_reparam", {}) for family in FAMILIES),
    *((family, "layer_scale", {"init": 0.5}) for family in FAMILIES),
    *((family, "deepnorm", {}) for family in POST_NORM),
    *((family, "admin", {}) for family in POST_NORM),
    *((family, "admin", {"trainable": False}) for family in POST_NORM),
]


def output(model, batch):
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize(("family", "method", "settings"), CASES, ids=str)
def test_saved_and_loaded_it_is_the_same_model(family, method, settings, tmp_path):
    torch.manual_seed(0)
    build, batch = FAMILIES[family]
    model = build().eval()
    names = list(model.state_dict())
    if METHODS[method].instead_of_batches:
        settings = {**settings, "batches": [batch]}
    handle = stabilize(model, method, **settings)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.02)
    target = torch.linspace(0, 9, output(model, batch).numel()).cos().view(output(model, batch).shape)
    for _ in range(3):
        (model(**batch).last_hidden_state - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = output(model, batch)
    handle.bake()
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    build().save_pretrained(tmp_path / "never patched")
    files = [load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "never patched")]
    assert files[0].keys() == files[1].keys()
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    torch.testing.assert_close(output(loaded.eval(), batch), trained, rtol=1e-5, atol=1e-5)
    assert (trained - output(build().eval(), batch)).abs().max() > 0.1


@pytest.mark.parametrize("family", POST_NORM)
def test_what_a_saved_model_loses_of_deepnorm_is_the_first_norms_epsilon(family, tmp_path):
    """Configurations of the library hold one epsilon, or none; the lost part is eps (1 - 1 / alpha^2) / (2 variance)."""
    torch.manual_seed(0)
    build, batch = FAMILIES[family]
    model = build().eval().double()
    stabilize(model, "deepnorm").bake()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    epsilons = [{name: m.eps for name, m in one.named_modules() if hasattr(m, "eps")} for one in (model, loaded)]
    changed = [name for name in epsilons[0] if epsilons[0][name] != epsilons[1][name]]
    assert len(changed) == (1 if family == "bert" else 2)  # one a stack
    difference = (output(loaded, batch) - output(model, batch)).abs().max()
    assert difference < (1e-11 if family == "bert" else 2e-5)
    for name in changed:
        loaded.get_submodule(name).eps = epsilons[0][name]
    torch.testing.assert_close(output(loaded, batch), output(model, batch), rtol=1e-12, atol=1e-12)
