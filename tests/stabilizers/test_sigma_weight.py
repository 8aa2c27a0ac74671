"""The effective weight: its spectral norm, its gradient, and the matrices that it is made of."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reparametrized import FAMILIES, TOKENS, gpt2, members, spectral_norm, torch_encoder, train
from tameformer.errors import PatchError
from tameformer.patch import named
from tameformer.stabilizers.sigma_reparam import Rows, effective_weight, is_matrix_layer, sigma_reparam, whole

family = pytest.mark.parametrize(("build", "run"), FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@family
def test_effective_weights_have_the_learned_spectral_norm(build, run):
    model = build()
    handle = sigma_reparam(model, gamma=1.0)
    train(model, 3, run, lr=1e-4)
    for one in members(model):
        effective = one.effective()
        for matrix, gamma in zip(one.parts.of(effective), one.gamma, strict=True):
            assert spectral_norm(matrix).item() == pytest.approx(abs(gamma.item()), rel=0.05)
    assert len(handle.new_parameters) == len(members(model))


@given(seed=st.integers(0, 10**6), out=st.integers(1, 7), in_=st.integers(1, 7), gamma=st.floats(-3, 3))
def test_algebra(seed, out, in_, gamma):
    generator = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(2, out, in_, generator=generator, dtype=torch.float64).unbind()
    layer = nn.Linear(in_, out, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    sigma_reparam(layer, gamma=gamma, where=is_matrix_layer)
    one = members(layer)[0]
    effective = layer.weight
    assert spectral_norm(effective).item() == pytest.approx(abs(gamma), abs=1e-12)
    effective.backward(grad)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    sigma, top = values[0], torch.outer(left[:, 0], right[0])
    product = (grad * weight).sum() / sigma
    torch.testing.assert_close(one.gamma.grad, product[None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.weight.grad, gamma / sigma * (grad - product * top), rtol=1e-10, atol=1e-12)
    assert (one.weight.grad * weight).sum().abs() < 1e-10 * (1 + abs(gamma))
    with torch.no_grad():
        one.weight.mul_(5.0)
        torch.testing.assert_close(layer.eval().weight, effective, rtol=1e-12, atol=1e-13)


def test_own_gradient_agrees_with_autograd_and_numbers():
    torch.manual_seed(3)
    weight, right = (
        torch.randn(5, 4, dtype=torch.float64),
        nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0),
    )
    gamma = torch.tensor(1.7, dtype=torch.float64)
    weight.requires_grad_(), gamma.requires_grad_()
    assert torch.autograd.gradcheck(effective_weight, (weight, gamma, right))
    assert torch.autograd.gradgradcheck(effective_weight, (weight, gamma, right))
    layer = nn.Linear(4, 6, dtype=torch.float64)
    sigma_reparam(layer, split=lambda *_: Rows((1, 2), groups=2))
    one = members(layer)[0]
    one.right.copy_(nn.functional.normalize(torch.randn(2, 4, dtype=torch.float64), dim=-1))  # any fixed vector
    assert torch.autograd.gradcheck(lambda weight, gamma: _at(one, weight, gamma), (one.weight, one.gamma))


def _at(one, weight, gamma):
    return torch.func.functional_call(one, {"gamma": gamma}, (weight,))


@pytest.mark.parametrize("shape", [(64, 48), (256, 256), (96, 300)])
def test_gradients_in_fp32_against_float64(shape):
    layer = nn.Linear(shape[1], shape[0])
    grad = torch.randn(shape)
    sigma_reparam(layer)
    one = members(layer)[0]
    layer.weight.backward(grad)
    weight, gamma = one.weight.detach().double().requires_grad_(), one.gamma.detach().double().requires_grad_()
    effective_weight(weight, gamma[0], nn.functional.normalize(one.right[0].double(), dim=0)).backward(grad.double())
    for mine, exact, bound in ((one.weight.grad, weight.grad, 1e-6), (one.gamma.grad, gamma.grad, 5e-5)):
        assert (mine.double() - exact).norm() <= bound * exact.norm()


def test_a_weight_that_has_become_zero_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    sigma_reparam(model)
    with torch.no_grad():
        members(model)[0].weight.zero_()
    with pytest.raises(PatchError, match=r"0\.weight has become zero and has no direction to scale"):
        model(torch.ones(1, 3))


def test_second_derivatives_are_refused_or_right():
    layer = nn.Linear(3, 3)
    sigma_reparam(layer)
    (grad,) = torch.autograd.grad(layer.weight.square().sum(), [members(layer)[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Layouts


def test_layouts_share_one_function():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(4)
    linear, transposed, conv = nn.Linear(6, 12), Conv1D(12, 6), nn.Conv2d(3, 12, (1, 2))
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.t())
        conv.weight.copy_(linear.weight.view(12, 3, 1, 2))
    grad = torch.randn(12, 6)
    for split in (whole, lambda *_: Rows((4, 4, 4)), lambda *_: Rows((2, 1, 1), groups=3)):
        handles, found = [], []
        for layer, same in ((linear, grad), (transposed, grad.t()), (conv, grad.view(12, 3, 1, 2))):
            handles.append(sigma_reparam(layer, split=split, gamma=1.3))
            one = members(layer)[0]
            one.weight.grad = None
            layer.weight.backward(same)
            found.append((layer.weight, one.weight.grad, one.gamma.grad))
        for weight, weight_grad, gamma_grad in (
            (found[1][0].t(), found[1][1].t(), found[1][2]),
            (found[2][0].flatten(1), found[2][1].flatten(1), found[2][2]),
        ):
            torch.testing.assert_close(weight, found[0][0])
            torch.testing.assert_close(weight_grad, found[0][1])
            torch.testing.assert_close(gamma_grad, found[0][2])
        for handle in handles:
            handle.remove()


def test_compiled_and_eager_formulas_agree():
    for split in (whole, lambda *_: Rows((4, 8)), lambda *_: Rows((2, 1, 1), groups=3)):
        layer = nn.Linear(6, 12)
        sigma_reparam(layer, split=split, gamma=0.7)
        one = members(layer)[0]
        gradient, plain = torch.func.grad_and_value(lambda weight, one=one: one(weight).pow(3).sum())(
            one.weight.detach()
        )
        value = layer.weight.pow(3).sum()
        value.backward()
        torch.testing.assert_close(plain, value.detach())
        torch.testing.assert_close(gradient, one.weight.grad)
        assert one._now.images is None or not torch._C._functorch.is_functorch_wrapped_tensor(one._now.images[0])


def test_fused_projections_are_taken_apart():
    assert [len(gamma) for gamma in sigma_reparam(torch_encoder()).new_parameters] == [3, 1, 1, 1] * 2
    model = gpt2()
    sizes = {name: len(gamma) for name, gamma in model.named_parameters() if name.endswith("gamma")}
    assert sizes == {}
    sigma_reparam(model)
    sizes = {
        name.split(".parametrizations")[0]: len(p) for name, p in model.named_parameters() if name.endswith("gamma")
    }
    assert sizes["transformer.h.0.attn.c_attn"] == 3
    assert sizes["transformer.h.0.attn.c_proj"] == 1
    joint = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert len(sigma_reparam(joint).new_parameters) == 4


def test_groups_of_heads_are_taken_apart():
    from transformers import FalconConfig, FalconModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 13, "num_attention_heads": 4, "num_kv_heads": 2}
    model = FalconModel(FalconConfig(new_decoder_architecture=True, **sizes))
    attention = model.h[0].self_attention
    weight = attention.query_key_value.weight.detach()
    by_head = weight.view(2, 4, 4, 16)  # groups, two queries and a key and a value, head_dim, dim
    sigma_reparam(model, where=named("*.query_key_value"))
    query, key, value = members(model)[0].parts.of(weight)
    assert torch.equal(query, by_head[:, :2].reshape(-1, 16))
    assert torch.equal(key, by_head[:, 2].reshape(-1, 16))
    assert torch.equal(value, by_head[:, 3].reshape(-1, 16))
    before = model.eval()(TOKENS).last_hidden_state
    with torch.no_grad():
        members(model)[0].gamma[0] *= 0  # no queries: attention is uniform, and still there
    assert not torch.allclose(model(TOKENS).last_hidden_state, before)


def test_sparse_gradients_of_a_tied_embedding():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4, sparse=True), "out": nn.Linear(4, 5)})
    model["out"].weight = model["embedding"].weight
    sigma_reparam(model)
    model["out"](model["embedding"](torch.tensor([1, 2]))).sum().backward()
    assert members(model)[0].weight.grad.layout == torch.strided
