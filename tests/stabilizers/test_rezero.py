import copy

import pytest
import torch
from torch import nn

from tameformer.errors import PatchError
from tameformer.models import EncoderConfig, encoder
from tameformer.stabilizers.rezero import rezero

TOKENS = torch.arange(14).view(2, 7)


def model(residual="pre", layers=2):
    torch.manual_seed(0)
    built = encoder(EncoderConfig(dim=16, num_heads=2, num_layers=layers, residual=residual), vocab_size=20)
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return built


def test_at_the_start_a_layer_passes_its_input_on():
    built = model()
    handle = rezero(built)
    x = torch.randn(2, 7, 16)
    assert torch.equal(built.stack.layers[0](x), x)
    assert [p.shape for p in handle.new_parameters] == [(1,)] * 2
    assert len(rezero(model(), per="branch").new_parameters) == 4


def test_one_number_scales_all_branches_of_a_layer():
    plain, scaled = model(layers=1), model(layers=1)
    (number,) = rezero(scaled, init=0.7).new_parameters
    for branch in (plain.stack.layers[0].attention.branch, plain.stack.layers[0].feed_forward.branch):
        branch.register_forward_hook(lambda module, args, output: output * 0.7)
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS))
    scaled(TOKENS).square().sum().backward()
    assert number.grad.abs() > 0
    assert sum(p is number for p in scaled.parameters()) == 1
    names = [name for name in scaled.state_dict() if name.endswith("scale")]
    assert names == ["stack.layers.0.attention.branch.out.parametrizations.weight.0.scale"]


def test_a_copy_shares_its_own_number():
    built = model()
    rezero(built, init=0.5)
    twin = copy.deepcopy(built)
    twin.stack.layers[0].attention.branch.out.parametrizations.weight[0].scale.data.fill_(0.0)
    down = twin.stack.layers[0].feed_forward.branch.down
    assert down.weight.abs().max() == 0
    assert built.stack.layers[0].feed_forward.branch.down.weight.abs().max() > 0


@pytest.mark.parametrize("remove_norms", [False, True])
@pytest.mark.parametrize("residual", ["pre", "post"])
def test_removal_and_baking(residual, remove_norms):
    built = model(residual)
    before, output = [(n, id(p)) for n, p in built.named_parameters()], built(TOKENS)
    names, norm = list(built.state_dict()), built.stack.layers[0].attention.norm
    handle = rezero(built, init=0.5, remove_norms=remove_norms)
    assert (built.stack.layers[0].attention.norm is norm) != remove_norms
    expected = built(TOKENS)
    handle.remove()
    assert [(n, id(p)) for n, p in built.named_parameters()] == before
    assert torch.equal(built(TOKENS), output)
    assert not torch.equal(expected, output)
    rezero(built, **handle.settings).bake()
    torch.testing.assert_close(built(TOKENS), expected, rtol=1e-5, atol=1e-6)
    kept = [name for name in names if ".norm." not in name or "layers" not in name]
    assert list(built.state_dict()) == (kept if remove_norms else names)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("remove_norms", [False, True])
def test_torchs_layers_in_evaluation_with_padding(remove_norms):
    torch.manual_seed(0)
    built = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 7, 16), torch.arange(7) > torch.tensor([[6], [4]])
    handle = rezero(built, init=0.5, remove_norms=remove_norms)
    with torch.no_grad():
        fused = built(x, src_key_padding_mask=padding)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = built(x, src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(fused[~padding], slow[~padding], rtol=1e-5, atol=1e-6)
    handle.remove()
    assert built.use_nested_tensor


def test_refusals():
    built = model()
    rezero(built)
    with pytest.raises(PatchError, match="rezero is on"):
        rezero(built)
    built = model()
    handle = rezero(built, remove_norms=True)
    state = list(built.state_dict())
    with pytest.raises(PatchError, match="rezero is on"):
        rezero(built, remove_norms=True)
    assert list(built.state_dict()) == state
    handle.remove()
