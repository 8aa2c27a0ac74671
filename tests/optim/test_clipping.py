import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tameformer.optim import clip_norm
from tameformer.optim.clipping import _factor_on_device


def parameters_with(gradients):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


@given(scale=st.floats(1e-3, 1e3), max_norm=st.floats(1e-2, 1e2))
def test_norm_after_is_the_smaller_of_norm_and_bound(scale, max_norm):
    gradients = [scale * torch.randn(3, 5, generator=torch.Generator().manual_seed(i)).double() for i in range(4)]
    parameters = parameters_with(gradients)
    before = clip_norm(parameters, max_norm)
    reference = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    after = torch.cat([parameter.grad.flatten() for parameter in parameters]).norm()
    assert float(before) == pytest.approx(float(reference), rel=1e-12)
    assert float(after) == pytest.approx(min(float(reference), max_norm), rel=1e-9)


def test_agrees_with_torch():
    gradients = [torch.randn(4, 4), torch.randn(7)]
    ours, torchs = parameters_with(gradients), parameters_with(gradients)
    norm = clip_norm(ours, 0.5)
    assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(torchs, 0.5)))
    for one, other in zip(ours, torchs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_non_finite_gradient_is_reported_and_spreads_nowhere(bad):
    gradients = [torch.tensor([1.0, bad]), torch.tensor([2.0, 3.0])]
    parameters = parameters_with(gradients)
    assert not torch.isfinite(clip_norm(parameters, 1.0))
    assert torch.equal(parameters[1].grad, gradients[1])


def test_without_a_bound_nothing_is_changed_and_without_gradients_the_norm_is_zero():
    parameters = parameters_with([torch.tensor([30.0, 40.0])])
    assert clip_norm(parameters, None) == 50.0
    assert torch.equal(parameters[0].grad, torch.tensor([30.0, 40.0]))
    assert clip_norm([nn.Parameter(torch.zeros(2))], 1.0) == 0.0


def test_the_path_for_devices_does_the_same():
    gradients = [torch.randn(4, 4), torch.randn(7)]
    on_cpu, on_device = parameters_with(gradients), parameters_with(gradients)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in on_device])
    torch._foreach_mul_([parameter.grad for parameter in on_device], _factor_on_device(norm, 0.5))
    torch.testing.assert_close(clip_norm(on_cpu, 0.5), norm)
    for one, other in zip(on_cpu, on_device, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    bad = parameters_with([torch.tensor([torch.nan]), torch.ones(1)])
    norm = nn.utils.get_total_norm([parameter.grad for parameter in bad])
    assert norm.isnan()
    assert _factor_on_device(norm, 0.5) == 1.0
    assert _factor_on_device(torch.tensor(0.25), 0.5) == 1.0


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_norm_of_each_gradient_after_clipping_is_told(max_norm):
    parameters = [nn.Parameter(torch.zeros(2)), *parameters_with([torch.randn(4, 4), torch.randn(7)])]
    told = []
    clip_norm(parameters, max_norm, tell_norms=lambda *norms: told.append(norms))
    ((owners, norms),) = told
    assert [id(owner) for owner in owners] == [id(parameter) for parameter in parameters[1:]]
    torch.testing.assert_close(norms, torch.stack([parameter.grad.norm() for parameter in parameters[1:]]))


def test_norms_that_are_not_good_enough_are_not_told():
    def refuse(*_):
        raise AssertionError

    for gradients in ([torch.ones(2).bfloat16()], [torch.ones(2), torch.ones(2).double()]):
        clip_norm(parameters_with(gradients), 0.5, tell_norms=refuse)
