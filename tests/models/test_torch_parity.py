"""Weights copied from torch's own Transformer; whole outputs and gradients compared in float64."""

import pytest
import torch
from torch import nn

from tameformer.models.stack import Stack, StackConfig, layer_stack
from tameformer.nn.masks import causal_mask, padding_mask, real_from_lengths

DIM, HEADS, HIDDEN, LAYERS = 16, 4, 24, 2
SETTINGS = [(residual, activation) for residual in ("pre", "post") for activation in ("relu", "gelu")]


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def our_stack(residual: str, activation: str, *, cross_attention: bool = False) -> Stack:
    config = StackConfig(
        dim=DIM, num_heads=HEADS, hidden_dim=HIDDEN, residual=residual, activation=activation, positions="none"
    )
    return layer_stack(config, num_layers=LAYERS, max_length=32, cross_attention=cross_attention)


def torch_layer(kind, residual: str, activation: str):
    return kind(DIM, HEADS, HIDDEN, dropout=0.0, activation=activation, batch_first=True, norm_first=residual == "pre")


def torch_encoder(residual: str, activation: str) -> nn.TransformerEncoder:
    norm = nn.LayerNorm(DIM) if residual == "pre" else None
    layer = torch_layer(nn.TransformerEncoderLayer, residual, activation)
    return nn.TransformerEncoder(layer, LAYERS, norm=norm, enable_nested_tensor=False)


def torch_decoder(residual: str, activation: str) -> nn.TransformerDecoder:
    norm = nn.LayerNorm(DIM) if residual == "pre" else None
    return nn.TransformerDecoder(torch_layer(nn.TransformerDecoderLayer, residual, activation), LAYERS, norm=norm)


def randomize(module: nn.Module) -> None:
    """Norm weights of one and biases of zero would hide a swap."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)


def copy_stack(ours: Stack, theirs: nn.Module) -> None:
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        copy_attention(mine.attention, other.self_attn, other.norm1)
        if hasattr(mine, "cross_attention"):
            copy_attention(mine.cross_attention, other.multihead_attn, other.norm2)
        mine.feed_forward.branch.up.load_state_dict(other.linear1.state_dict())
        mine.feed_forward.branch.down.load_state_dict(other.linear2.state_dict())
        mine.feed_forward.norm.load_state_dict((other.norm3 if hasattr(other, "norm3") else other.norm2).state_dict())
    if theirs.norm is not None:
        ours.norm.load_state_dict(theirs.norm.state_dict())


def copy_attention(placement: nn.Module, theirs: nn.MultiheadAttention, norm: nn.LayerNorm) -> None:
    attention = placement.branch
    linears = (attention.query, attention.key, attention.value)
    for linear, weight, bias in zip(linears, theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True):
        linear.load_state_dict({"weight": weight, "bias": bias})
    attention.out.load_state_dict(theirs.out_proj.state_dict())
    placement.norm.load_state_dict(norm.state_dict())


@pytest.mark.parametrize(("residual", "activation"), SETTINGS)
def test_encoder_with_padding(residual, activation):
    theirs, ours = torch_encoder(residual, activation), our_stack(residual, activation)
    randomize(theirs)
    copy_stack(ours, theirs)
    x, real = torch.randn(3, 7, DIM), real_from_lengths(torch.tensor([7, 4, 1]), 7)
    expected = theirs(x, src_key_padding_mask=~real)
    got = ours(x, mask=padding_mask(real))
    torch.testing.assert_close(got[real], expected[real], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("residual", "activation"), SETTINGS)
def test_causal_encoder_with_is_causal_and_with_a_mask(residual, activation):
    theirs, ours = torch_encoder(residual, activation), our_stack(residual, activation)
    randomize(theirs)
    copy_stack(ours, theirs)
    x = torch.randn(2, 6, DIM)
    expected = theirs(x, mask=nn.Transformer.generate_square_subsequent_mask(6), is_causal=True)
    torch.testing.assert_close(ours(x, is_causal=True), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours(x, mask=causal_mask(6, 6)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("residual", "activation"), SETTINGS)
def test_decoder_with_memory(residual, activation):
    theirs, ours = torch_decoder(residual, activation), our_stack(residual, activation, cross_attention=True)
    randomize(theirs)
    copy_stack(ours, theirs)
    x, memory, real = torch.randn(3, 5, DIM), torch.randn(3, 7, DIM), real_from_lengths(torch.tensor([7, 4, 1]), 7)
    expected = theirs(
        x,
        memory,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(5),
        memory_key_padding_mask=~real,
        tgt_is_causal=True,
    )
    got = ours(x, memory=memory, memory_mask=padding_mask(real), is_causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")  # nn.Transformer leaves no choice
def test_whole_transformer():
    theirs = nn.Transformer(
        DIM, HEADS, LAYERS, LAYERS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True, activation="relu"
    )
    encoder, decoder = our_stack("pre", "relu"), our_stack("pre", "relu", cross_attention=True)
    randomize(theirs)
    copy_stack(encoder, theirs.encoder)
    copy_stack(decoder, theirs.decoder)
    source, target = torch.randn(2, 7, DIM), torch.randn(2, 5, DIM)
    expected = theirs(source, target, tgt_mask=nn.Transformer.generate_square_subsequent_mask(5), tgt_is_causal=True)
    got = decoder(target, memory=encoder(source), is_causal=True)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_gradients_of_every_weight(residual):
    theirs, ours = torch_decoder(residual, "gelu"), our_stack(residual, "gelu", cross_attention=True)
    randomize(theirs)
    copy_stack(ours, theirs)
    x, memory = torch.randn(2, 5, DIM), torch.randn(2, 7, DIM)
    direction = torch.randn(2, 5, DIM)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    (theirs(x, memory, tgt_mask=causal, tgt_is_causal=True) * direction).sum().backward()
    (ours(x, memory=memory, is_causal=True) * direction).sum().backward()
    expected = our_stack(residual, "gelu", cross_attention=True)  # their gradients in our layout
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    copy_stack(expected, theirs)
    gradients = dict(expected.named_parameters())
    assert len(gradients) == len(list(ours.parameters()))
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].data, rtol=1e-10, atol=1e-10, msg=name)
