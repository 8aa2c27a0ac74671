import pytest
import torch
from torch import nn
from transformers import MarianConfig, MarianMTModel

from tameformer.errors import PatchError
from tameformer.models import EncoderConfig, EncoderDecoderConfig, encoder, encoder_decoder
from tameformer.stabilizers.t_fixup import t_fixup, t_fixup_constants

TOKENS = torch.arange(1, 15).view(2, 7)


def pair(residual="post", **config):
    torch.manual_seed(0)
    small = {"dim": 16, "num_heads": 2, "num_encoder_layers": 2, "num_decoder_layers": 3, **config}
    return encoder_decoder(EncoderDecoderConfig(residual=residual, **small), vocab_size=20, padding_id=0)


def test_the_constants():
    assert t_fixup_constants(6)[0] == pytest.approx(0.67 * 6**-0.25)
    assert t_fixup_constants(6)[1] == t_fixup_constants(6, is_decoder=True)[0] == pytest.approx(54**-0.25)


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_it_is_our_model_without_norms_from_scaled_weights(residual):
    patched, reference = pair(residual), pair("none")
    handle = t_fixup(patched)
    weights = dict(pair(residual).named_parameters())
    factors = {"encoder": 0.67 * 2**-0.25, "decoder": 27**-0.25}
    for name, parameter in reference.named_parameters():
        factor = 18**-0.25 if name == "embedding.weight" else 1.0
        if "layers" in name and name.endswith(("value.weight", "out.weight", "up.weight", "down.weight")):
            factor = factors[name.partition(".")[0]]
        parameter.data.copy_(weights[name] * factor)
        torch.testing.assert_close(patched.get_parameter(name), parameter)
    patched.encoder.norm = patched.decoder.norm = nn.Identity()
    torch.testing.assert_close(patched(TOKENS, TOKENS), reference(TOKENS, TOKENS))
    assert handle.new_parameters == ()


def test_embeddings_of_each_side_by_its_own_depth():
    built, plain = pair(tie_embeddings=False), pair(tie_embeddings=False)
    t_fixup(built)
    torch.testing.assert_close(built.target_embedding.weight, plain.target_embedding.weight * 27**-0.25)
    torch.manual_seed(0)
    config = {"vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "pad_token_id": 0}
    model = MarianMTModel(MarianConfig(**config, decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1))
    shared, positions = model.model.shared.weight.clone(), model.model.encoder.embed_positions.weight.clone()
    t_fixup(model)
    torch.testing.assert_close(model.model.shared.weight, shared * 9**-0.25)
    assert torch.equal(model.model.encoder.embed_positions.weight, positions)


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_removal_is_exact_and_baking_keeps(residual):
    built = pair(residual)
    before, output = [(n, id(p)) for n, p in built.named_parameters()], built(TOKENS, TOKENS)
    with t_fixup(built):
        patched = built(TOKENS, TOKENS)
    assert [(n, id(p)) for n, p in built.named_parameters()] == before
    assert torch.equal(built(TOKENS, TOKENS), output)
    t_fixup(built).bake()
    assert torch.equal(built(TOKENS, TOKENS), patched)
    assert not any("_started" in name for module in built.modules() for name in vars(module))


def test_refusals():
    built = encoder(EncoderConfig(dim=16, num_heads=2, num_layers=1), vocab_size=20)
    t_fixup(built)
    with pytest.raises(
        PatchError, match=r"would remove the norm stack.layers.0.attention.norm, which is removed already"
    ):
        t_fixup(built)
