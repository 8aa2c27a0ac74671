import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tameformer.optim import AdaptiveClip
from tameformer.optim.adaptive_clip import learned, spike_factors


class Slow:
    """One group, by the rule as it is written, in Python's own numbers."""

    def __init__(self, threshold=2.5, decay=0.97, warmup_steps=25):
        self.threshold, self.decay, self.warmup_steps = threshold, decay, warmup_steps
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def after(self, norm: float) -> float:
        if not math.isfinite(norm) or norm == 0:
            return norm
        width = max(self.threshold * math.sqrt(self.variance), math.log(2))
        above, known = math.log(norm) - self.mean, self.count >= self.warmup_steps
        change = min(above, width) if known else above
        weight = max(1 / (self.count + 1), 1 - self.decay)
        if known and above > width:
            norm = math.exp(self.mean + width**2 / above)
        self.count, self.mean = self.count + 1, self.mean + weight * change
        self.variance = (1 - weight) * (self.variance + weight * change**2)
        return norm


def parts(groups=1, size=6):
    weights = [nn.Parameter(torch.zeros(size)) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": [weight], "name": f"group{n}"} for n, weight in enumerate(weights)], lr=0.1)
    return weights, optimizer


def give(weights, norms):
    for weight, norm in zip(weights, norms, strict=True):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0] = norm


def clipped(clip, weights, norms) -> list[float]:
    give(weights, norms)
    clip()
    return [float(weight.grad[0]) for weight in weights]


@given(norms=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60))
def test_it_does_what_the_rule_says(norms):
    weights, optimizer = parts()
    clip, slow = AdaptiveClip(optimizer, warmup_steps=5), Slow(warmup_steps=5)
    for norm in norms:
        assert clipped(clip, weights, [norm]) == [pytest.approx(slow.after(norm), rel=1e-3)]


def test_gradients_of_constant_scale_are_never_touched():
    draw = torch.Generator().manual_seed(0)
    weights, optimizer = parts(size=64)
    clip = AdaptiveClip(optimizer)
    for _ in range(2000):
        weights[0].grad = torch.randn(64, generator=draw)
        before = weights[0].grad.clone()
        clip()
        assert torch.equal(weights[0].grad, before)
        assert clip.readings()["clipped"] == 0


def test_a_spike_is_cut_to_the_usual_size_and_moves_the_limit_little():
    weights, optimizer = parts()
    clip = AdaptiveClip(optimizer)
    for number in range(100):
        clipped(clip, weights, [1.0 + 0.1 * (number % 3)])
    limit = clip.readings()["limit/group0"]
    (after,) = clipped(clip, weights, [1000.0])
    assert 0.9 < after < 1.3
    assert clip.readings()["clipped"] == 1
    clipped(clip, weights, [1.0])
    assert limit < clip.readings()["limit/group0"] < 1.3 * limit


def test_a_new_level_is_learned():
    weights, optimizer = parts()
    clip = AdaptiveClip(optimizer)
    for _ in range(50):
        clipped(clip, weights, [1.0])
    steps = next(step for step in range(1000) if clipped(clip, weights, [4.0]) == [4.0])
    assert 5 < steps < 100


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_neither_what_is_not_finite_nor_zero_enters_the_statistics(bad):
    """Published forms break here: a mean that is NaN for ever, 0 times infinity, a smallest norm of 0 that freezes a tensor."""
    weights, optimizer = parts()
    clean, disturbed = AdaptiveClip(optimizer), AdaptiveClip(optimizer)
    for number in range(60):
        if number in (0, 10, 40):
            (after,) = clipped(disturbed, weights, [bad])
            assert after == bad or (math.isnan(bad) and math.isnan(after))
            assert disturbed.readings()["clipped"] == 0
        for clip in (clean, disturbed):
            clipped(clip, weights, [1.0 + 0.1 * (number % 5)])
    assert disturbed.state_dict() == clean.state_dict()
    assert clipped(disturbed, weights, [1e3])[0] < 2


def test_a_group_beside_one_that_is_not_finite_is_left_alone():
    weights, optimizer = parts(groups=2)
    clip = AdaptiveClip(optimizer)
    for _ in range(40):
        clipped(clip, weights, [1.0, 10.0])
    before = clip.state_dict()
    assert clipped(clip, weights, [1e3, math.inf]) == [1e3, math.inf]
    assert clip.state_dict() == before


def test_groups_are_judged_by_their_own_past():
    weights, optimizer = parts(groups=2)
    clip = AdaptiveClip(optimizer)
    for _ in range(40):
        clipped(clip, weights, [1.0, 100.0])
    first, second = clipped(clip, weights, [50.0, 100.0])
    assert 1.0 <= first < 1.3
    assert second == 100.0
    limits = clip.readings()
    assert limits["limit/group0"] == pytest.approx(2.0, rel=1e-3)
    assert limits["limit/group1"] == pytest.approx(200.0, rel=1e-3)


@pytest.mark.parametrize("at", [3, 30])
def test_a_resume_has_the_same_bits(at):
    draw = torch.Generator().manual_seed(1)
    norms = (torch.randn(60, 2, generator=draw).exp() * torch.tensor([1.0, 5.0])).tolist()
    weights, optimizer = parts(groups=2)
    straight, resumed = AdaptiveClip(optimizer, warmup_steps=10), AdaptiveClip(optimizer, warmup_steps=10)
    for number, pair in enumerate(norms):
        if number == at:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = AdaptiveClip(optimizer, warmup_steps=10)
            resumed.load_state_dict(state)
        assert clipped(resumed, weights, pair) == clipped(straight, weights, pair)
    assert resumed.state_dict() == straight.state_dict()


@pytest.mark.parametrize("refused", [False, torch.tensor(0.0)])
def test_nothing_is_learned_of_a_refused_step(refused):
    weights, optimizer = parts()
    clip = AdaptiveClip(optimizer)
    for _ in range(30):
        clipped(clip, weights, [1.0])
    before = clip.state_dict()
    clipped(clip, weights, [7.0])
    assert clip.state_dict() != before
    clip.settle(refused)
    assert clip.state_dict() == before
    clipped(clip, weights, [7.0])
    clip.settle(torch.tensor(1.0))
    assert clip.state_dict() != before


def test_a_fixed_bound_holds_besides_and_norms_are_told_after_clipping():
    weights, optimizer = parts(groups=2)
    clip, told = AdaptiveClip(optimizer, max_norm=5.0), []
    give(weights, [6.0, 8.0])
    assert clip(tell_norms=lambda *norms: told.append(norms)) == 10.0
    assert [float(weight.grad.norm()) for weight in weights] == pytest.approx([3.0, 4.0])
    ((owners, norms),) = told
    assert [id(owner) for owner in owners] == [id(weight) for weight in weights]
    torch.testing.assert_close(norms, torch.tensor([3.0, 4.0]))


def test_gradients_of_several_types_and_groups_without_one():
    weights, optimizer = parts(groups=3)
    weights[1].data = weights[1].data.double()
    clip = AdaptiveClip(optimizer, warmup_steps=2)
    for _ in range(4):
        give(weights[:2], [1.0, 2.0])
        clip()
    give(weights[:2], [100.0, 2.0])
    clip()
    assert float(weights[0].grad[0]) < 1.3
    assert float(weights[1].grad[0]) == 2.0
    assert weights[2].grad is None
    assert clip.state_dict()["statistics"]["group2"] == [0.0, 0.0, 0.0]


def test_the_functions_are_the_same_for_all_groups_at_once():
    statistics = torch.tensor([[30.0, 0.5, 0.04], [3.0, 0.0, 0.0]])
    norms = torch.tensor([20.0, 20.0])
    factors, limits = spike_factors(norms, statistics, threshold=2.5, warmup_steps=25)
    assert factors[0] < 0.2
    assert factors[1] == 1
    assert limits[1] == math.inf
    after = learned(norms, limits, statistics, decay=0.97)
    assert after[:, 0].tolist() == [31.0, 4.0]


@pytest.mark.gpu
@pytest.mark.parametrize("max_norm", [None, 5.0])
def test_nothing_waits_for_an_accelerator(max_norm):
    weights, _ = parts(groups=2)
    on_device = [nn.Parameter(weight.detach().cuda()) for weight in weights]
    clips = [AdaptiveClip(torch.optim.SGD([{"params": [weight]} for weight in each], lr=0.1), max_norm=max_norm)
             for each in (weights, on_device)]  # fmt: skip
    for number in range(40):
        give(weights, [1.0, 100.0 if number == 39 else 1.0])
        for weight, other in zip(weights, on_device, strict=True):
            assert weight.grad is not None
            other.grad = weight.grad.cuda()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            clips[1](tell_norms=lambda *told: None)
            clips[1].settle(torch.ones((), device="cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        clips[0]()
    for weight, other in zip(weights, on_device, strict=True):
        torch.testing.assert_close(other.grad.cpu(), weight.grad)
    assert clips[1].readings()["clipped"] == 1


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"expected threshold above 0, .* got 0, 0.97 and 25"):
        AdaptiveClip(parts()[1], threshold=0)
