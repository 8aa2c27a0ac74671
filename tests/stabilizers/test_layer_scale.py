import copy

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tameformer.errors import PatchError
from tameformer.models import EncoderConfig, encoder
from tameformer.optim import decay_groups
from tameformer.patch import named
from tameformer.patch.parametrized import parametrize
from tameformer.stabilizers.layer_scale import layer_scale, start_scale

TOKENS = torch.arange(14).view(2, 7)


def model(residual="pre", layers=2):
    torch.manual_seed(0)
    built = encoder(EncoderConfig(dim=16, num_heads=2, num_layers=layers, residual=residual), vocab_size=20)
    for parameter in built.parameters():  # so that biases take part
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return built


def torch_model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("residual", ["pre", "post", "peri", "none"])
def test_each_branch_is_multiplied_by_channel(residual):
    plain, scaled = model(residual, 1).double(), model(residual, 1).double()
    factors = layer_scale(scaled).new_parameters
    for index, factor in enumerate(factors):
        factor.data.copy_(torch.linspace(-1, 2 + index, 16))
    branches = [plain.stack.layers[0].attention, plain.stack.layers[0].feed_forward]
    for branch, factor in zip(branches, factors, strict=True):
        last = branch.out_norm if residual == "peri" else branch.branch
        last.register_forward_hook(lambda module, args, output, factor=factor: output * factor)
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS), rtol=1e-12, atol=1e-12)


def test_init_one_leaves_the_outputs_and_the_default_follows_depth():
    plain, scaled = model(), model()
    layer_scale(scaled, init=1.0)
    torch.testing.assert_close(scaled(TOKENS), plain(TOKENS), rtol=0, atol=0)
    assert [start_scale(depth) for depth in (18, 19, 25)] == [0.1, 1e-5, 1e-6]
    assert torch.cat([*layer_scale(model()).new_parameters]).unique().tolist() == pytest.approx([0.1])


def test_removal_is_exact():
    built = model()
    before = [(name, id(p), p.clone()) for name, p in built.named_parameters()]
    output = built(TOKENS)
    with layer_scale(built):
        assert not torch.equal(built(TOKENS), output)
    after = list(built.named_parameters())
    assert [(name, id(p)) for name, p in after] == [(name, key) for name, key, _ in before]
    assert all(torch.equal(p, value) for (_, p), (*_, value) in zip(after, before, strict=True))
    assert torch.equal(built(TOKENS), output)
    assert type(built.stack.layers[0].feed_forward.branch.down) is nn.Linear


@pytest.mark.parametrize("build", [model, lambda: model("peri"), torch_model])
def test_baking_gives_a_plain_model_with_equal_outputs(build):
    built, inputs = build(), TOKENS
    if isinstance(built, nn.TransformerEncoder):
        inputs = torch.randn(2, 7, 16)
    keys, objects = list(built.state_dict()), [id(p) for p in built.parameters()]
    handle = layer_scale(built)
    for factor in handle.new_parameters:
        factor.data.uniform_(0.5, 2)
    expected = built(inputs)
    handle.bake()
    assert list(built.state_dict()) == keys
    assert [id(p) for p in built.parameters()] == objects
    fresh = build()
    fresh.load_state_dict(load(save(built.state_dict())))
    torch.testing.assert_close(fresh(inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_factors_act_in_torchs_fused_path_too(mode):
    built, x = torch_model(), torch.randn(2, 7, 16)
    handle = layer_scale(built, init=1.0)
    assert "MultiheadAttention" in str(built)
    built.train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        for factor in handle.new_parameters:
            before = built(x)
            factor.data.mul_(2)
            assert (built(x) - before).abs().max() > 1e-3


def test_the_factors_reach_the_optimizer_once_and_undecayed():
    built = model()
    handle = layer_scale(built)
    groups = decay_groups(built, weight_decay=0.1)
    places = [(group["weight_decay"], p) for group in groups for p in group["params"]]
    found = [p for decay, p in places if any(p is new for new in handle.new_parameters) and decay == 0]
    assert len(found) == len(handle.new_parameters) == 4
    built(TOKENS).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in found)


def test_copies_and_checkpoints_of_a_patched_model():
    built = model()
    handle = layer_scale(built)
    for factor in handle.new_parameters:
        factor.data.uniform_(0.5, 2)
    other = model()
    layer_scale(other, **handle.settings)
    other.load_state_dict(built.state_dict())
    assert torch.equal(other(TOKENS), built(TOKENS))
    twin = copy.deepcopy(built)
    expected = built(TOKENS)
    for name, parameter in twin.named_parameters():
        if name.endswith("scale"):
            parameter.data.zero_()
    assert torch.equal(built(TOKENS), expected)
    assert not torch.equal(twin(TOKENS), expected)


def test_refusals():
    built = model()
    layer_scale(built)
    with pytest.raises(PatchError, match=r"layer_scale is on .*attention.branch.out.weight already"):
        layer_scale(built)
    assert len(built.stack.layers[0].attention.branch.out.parametrizations.weight) == 1
    with pytest.raises(PatchError, match=r"where= takes no residual branch; they end in stack.layers.0"):
        layer_scale(model(), where=named("nothing"))
    with pytest.raises(PatchError, match="looked for residual branches"):
        layer_scale(nn.Linear(2, 2))
    assert layer_scale(model(), where=named("*.down")).names == tuple(
        f"stack.layers.{i}.feed_forward.branch.down" for i in (0, 1)
    )


def test_a_tied_output_stays_tied_and_is_not_folded():
    built = model()
    first, second = (layer.feed_forward.branch.down for layer in built.stack.layers)
    second.weight = first.weight
    handle = layer_scale(built)
    assert first.parametrizations.weight.original is second.parametrizations.weight.original
    with pytest.raises(PatchError, match=r"its weight serves at other places"):
        handle.bake()
    assert handle.is_active
    handle.remove()
    assert first.weight is second.weight


def test_it_stacks_with_another_patch_of_the_weight():
    built = model()
    down, other = built.stack.layers[0].feed_forward.branch.down, nn.Hardtanh(-0.1, 0.1)
    weight = down.weight
    parametrize(down, "weight", other)
    handle = layer_scale(built, init=0.5)
    torch.testing.assert_close(down.weight, weight.clamp(-0.1, 0.1) / 2)
    with pytest.raises(PatchError, match="bake Hardtanh first"):
        handle.bake()
    handle.remove()
    torch.testing.assert_close(down.weight, weight.clamp(-0.1, 0.1))
