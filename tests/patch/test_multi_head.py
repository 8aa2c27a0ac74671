"""`MultiheadAttention` opened, against the module itself."""

import copy
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from tameformer.errors import PatchError
from tameformer.patch.attend import open_attention
from tameformer.patch.multi_head import TAPS

REAL = torch.arange(7) < torch.tensor([[5], [7], [2]])
FUTURE = torch.ones(7, 7, dtype=torch.bool).triu(1)
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": ~REAL},
    "causal": {"attn_mask": FUTURE},
    "causal-hint": {"attn_mask": FUTURE, "is_causal": True},
    "both": {"attn_mask": FUTURE, "key_padding_mask": ~REAL},
    "both-hint": {"attn_mask": FUTURE, "key_padding_mask": ~REAL, "is_causal": True},
    "float": {"attn_mask": torch.linspace(-3, 3, 49).view(7, 7)},
    "float-causal": {"attn_mask": nn.Transformer.generate_square_subsequent_mask(7), "is_causal": True},
    "float-padding": {"key_padding_mask": torch.zeros(3, 7).masked_fill(~REAL, -torch.inf)},
    "both-float": {
        "attn_mask": torch.linspace(-3, 3, 49).view(7, 7),
        "key_padding_mask": torch.zeros(3, 7).masked_fill(~REAL, -torch.inf),
    },
    "every-head": {"attn_mask": torch.rand(12, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.3},
}


def opened(module, undo):
    open_attention(undo, module, "attention")
    return module


def inputs_for(module, shares):
    x, y, z = (torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    given = {"all": (x, x, x), "memory": (x, y, y), "none": (x, y, z)}[shares]
    return given if module.batch_first else tuple({id(t): t.transpose(0, 1) for t in (x, y, z)}[id(t)] for t in given)


def both(module, *args, **kwargs):
    """What the module returns, and then opened, from the same random numbers; with the gradients of both."""
    found = []
    for is_open in (False, True):
        with ExitStack() as undo:
            if is_open:
                opened(module, undo)
            torch.manual_seed(1)
            output, weights = module(*args, **kwargs)
            module.zero_grad()
            if output.requires_grad:
                output.square().sum().backward()
            found.append((output, weights, [p.grad for p in module.parameters() if p.grad is not None]))
    return found


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_it_gives_what_the_module_gives(masks, need_weights, mode):
    module = nn.MultiheadAttention(16, 4, 0.3, batch_first=True).train(mode == "train")
    module.in_proj_bias.data.uniform_(-1, 1)
    given = {**MASKS[masks], "need_weights": need_weights}
    with torch.set_grad_enabled(mode != "no_grad"):
        plain, written_out = both(module, *inputs_for(module, "all"), **given)
    torch.testing.assert_close(written_out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shares", ["all", "memory", "none"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_projections_are_torchs_bit_for_bit(batch_first, shares, bias):
    module = nn.MultiheadAttention(16, 4, 0.3, batch_first=batch_first, bias=bias)
    for need_weights in (True, False):
        plain, written_out = both(module, *inputs_for(module, shares), need_weights=need_weights)
        torch.testing.assert_close(written_out, plain, rtol=0, atol=0)


def test_keys_and_values_of_other_widths_and_weights_of_every_head():
    module = nn.MultiheadAttention(16, 4, kdim=12, vdim=10, batch_first=True)
    given = torch.randn(3, 5, 16), torch.randn(3, 7, 12), torch.randn(3, 7, 10)
    plain, written_out = both(module, *given, average_attn_weights=False)
    assert plain[1].shape == (3, 4, 5, 7)
    torch.testing.assert_close(written_out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_single_sequence(need_weights):
    module, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(7, 16)
    given = {"need_weights": need_weights, "key_padding_mask": ~REAL[0], "attn_mask": FUTURE}
    plain, written_out = both(module, x, x, x, **given)
    torch.testing.assert_close(written_out, plain, rtol=1e-5, atol=1e-6)


def test_autocast():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            plain, written_out = both(module, *inputs_for(module, "all"), need_weights=need_weights)
        assert written_out[0].dtype == plain[0].dtype == torch.bfloat16
        torch.testing.assert_close(written_out[0], plain[0], rtol=0.02, atol=0.02)


def test_a_query_without_a_key_gives_zeros_in_place_of_nan():
    module, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(1, 3, 16)
    padding = torch.ones(1, 3, dtype=torch.bool)
    plain, written_out = both(module, x, x, x, key_padding_mask=padding)
    assert plain[1].isnan().all()
    assert torch.equal(written_out[1], torch.zeros(1, 3, 3))
    assert all(grad.isfinite().all() for grad in written_out[2])


def test_two_users_share_it_and_nothing_is_left():
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    before, keys = dict(vars(module)), list(module.state_dict())
    first, second = ExitStack(), ExitStack()
    assert open_attention(first, module, "a") is open_attention(second, module, "a")
    assert list(module.state_dict()) == keys
    twin = copy.deepcopy(module)
    first.close()
    assert "forward" in vars(module)
    assert set(TAPS) <= set(module._modules)
    second.close()
    assert vars(module) == before
    assert list(module._modules) == ["out_proj"]
    assert vars(twin)["forward"].module is twin  # the copy stays open, and is its own
    twin.in_proj_weight.data.zero_()
    assert not torch.equal(module(*inputs_for(module, "all"))[1], twin(*inputs_for(module, "all"))[1])


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_fused_layer_does_not_go_round_it(mode, norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first).train(mode == "train")
    x, calls = torch.randn(3, 7, 16), []
    with ExitStack() as undo, torch.set_grad_enabled(mode != "no_grad"):
        plain = layer(x)
        opened(layer.self_attn, undo)
        layer.self_attn.get_submodule(TAPS[0]).register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-6)
    assert calls == [1]


class Changed(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_refusals():
    for module, words in (
        (nn.MultiheadAttention(16, 4, add_bias_kv=True), "adds keys of its own"),
        (nn.MultiheadAttention(16, 4, add_zero_attn=True), "adds keys of its own"),
        (Changed(16, 4), "forward of its own"),
    ):
        before = dict(vars(module))
        with pytest.raises(PatchError, match=f"attention .*{words}"):
            opened(module, ExitStack())
        assert vars(module) == before
    module, x = nn.MultiheadAttention(16, 4), torch.randn(3, 2, 16)
    with ExitStack() as undo, pytest.raises(ValueError, match="expected attn_mask beside is_causal"):
        opened(module, undo)(x, x, x, is_causal=True)
