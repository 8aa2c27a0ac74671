import json
import math
import random
from statistics import median

import pytest
import torch

from tameformer.health.policy import GuardConfig, Policy
from tameformer.health.spikes import SpikeWindow, spike_limit


def policy(**settings) -> Policy:
    return Policy(GuardConfig(**{"window": 16, "min_values": 8, "max_skips": 2, "healthy_steps": 3, **settings}))


def fed(policy: Policy, steps: int, seed: int = 0) -> Policy:
    draw = random.Random(seed)
    for step in range(1, steps + 1):
        assert policy.observe(step, 2 + 0.1 * draw.random(), 1 + 0.1 * draw.random(), taken=True) is None
    return policy


def test_the_limit_is_that_of_median_and_mad():
    draw = random.Random(1)
    values = [draw.gauss(5.0, 2.0) for _ in range(101)]
    ordered = sorted(values)
    middle = ordered[50]
    mad = sorted(abs(value - middle) for value in values)[50]
    assert spike_limit(values, threshold=6.0) == pytest.approx(middle + 6 * 1.4826 * mad, rel=1e-12)
    assert middle == median(values)


def test_a_window_speaks_only_when_it_knows_enough_and_forgets_old_levels():
    window = SpikeWindow(threshold=5.0, size=8, min_values=4)
    for value in (1.0, 1.1, 0.9):
        window.add(value)
        assert window.limit() == math.inf
    window.add(1.0)
    assert 1.0 < window.limit() < 2.0
    for _ in range(16):
        window.add(4.0)
    assert window.limit() == pytest.approx(4.4)


def test_even_gradient_norms_have_no_spike_at_twice_their_median():
    """As in a recorded recurrent run: median 0.32, hardly any spread, and a harmless step of 1.1."""
    draw = random.Random(0)
    guarded = policy()
    for step in range(1, 21):
        guarded.observe(step, 4.6 + 0.01 * draw.random(), 0.32 + 0.005 * draw.random(), taken=True)
    loss, norm = guarded.limits()
    assert 1.25 < norm < 1.31
    assert loss == pytest.approx(1.1 * 4.605, rel=0.01)
    narrow = fed(policy(grad_norm_ratio=1.0), 20).limits()[1]
    assert narrow < 2 < fed(policy(), 20).limits()[1]


def test_widely_spread_norms_are_judged_by_their_spread():
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spike_limit(values, threshold=10.0, ratio=4.0) == pytest.approx(3 + 14.826)


def test_a_run_that_has_learned_its_data_by_heart_is_not_ended_for_hard_batches():
    """As five of five runs of 9 epochs on 2,000 texts were: losses near 0, but for a text in 16 that is still guessed wrong."""
    draw = random.Random(0)
    guarded = Policy()
    for step in range(1, 1000):
        usual = max(0.025, 0.69 * (1 - step / 400))
        loss = usual * draw.expovariate(1.0) + (0.3 if step > 400 and draw.random() < 0.1 else 0.0)
        taken = loss <= guarded.limits()[0]
        guarded.observe(step, loss, 1.0, taken=taken)
        assert taken or step < 400, step
    usual, limit = 0.02, guarded.limits()[0]
    assert 0.5 < limit < 0.9  # what it began with, where weights that break are told from a hard batch
    assert [guarded.observe(step, 1.5, 1.0, taken=False).do for step in range(1000, 1009)][-1] == "roll_back"
    plain = SpikeWindow()
    for _ in range(64):
        plain.add(usual)
    assert plain.limit() < 0.03  # gradients have no such rule


def test_a_gradient_of_four_times_the_usual_norm_doubles_adams_update():
    """The reason behind `GuardConfig.grad_norm_ratio`: independent gradients, one of them scaled."""

    def update(factor: float, steps: int = 1000) -> float:
        generator = torch.Generator().manual_seed(0)
        weight = torch.zeros(1000, requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=1.0, betas=(0.9, 0.999))
        before = weight.detach().clone()
        for step in range(steps):
            before = weight.detach().clone()
            weight.grad = torch.randn(1000, generator=generator) * (factor if step == steps - 1 else 1.0)
            optimizer.step()
        return float((weight.detach() - before).norm())

    usual = update(1.0)
    assert update(2.0) / usual == pytest.approx(1.3, abs=0.1)
    assert update(GuardConfig().grad_norm_ratio) / usual == pytest.approx(2.0, abs=0.15)
    assert update(10.0) / usual > 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_moves_a_limit(bad):
    clean, disturbed = (SpikeWindow(size=16, min_values=4) for _ in range(2))
    for step in range(40):
        clean.add(step % 5)
        disturbed.add(step % 5)
        disturbed.add(bad)
    assert disturbed.state() == clean.state()
    assert math.isfinite(disturbed.limit())


def test_refused_values_never_move_the_limits():
    """A window with the spikes in it would follow them: here a thousand refused steps change nothing."""
    guarded = fed(policy(max_skips=10**6), 20)
    before = guarded.limits()
    for step in range(21, 1021):
        guarded.observe(step, 1e6 if step % 2 else math.nan, 1e6, taken=False)
    assert guarded.limits() == before


def test_decisions_after_a_resume_have_the_same_bits():
    straight, resumed = fed(policy(), 13), fed(policy(), 13)
    straight.observe(14, math.nan, 1.0, taken=False)
    resumed.observe(14, math.nan, 1.0, taken=False)
    again = policy()
    again.load(json.loads(json.dumps(resumed.state())))
    draw = random.Random(5)
    for step in range(15, 90):
        loss, norm = 2 + 0.3 * draw.random(), 1 + 0.3 * draw.random()
        taken = loss <= straight.limits()[0] and norm <= straight.limits()[1]
        assert again.observe(step, loss, norm, taken=taken) == straight.observe(step, loss, norm, taken=taken)
        assert again.limits() == straight.limits()
        assert again.state() == straight.state()


def test_a_loss_that_stays_high_leads_back_and_then_to_the_end():
    guarded = fed(policy(max_rollbacks=1), 20)
    state = guarded.state()
    assert guarded.horizon(20) == 17
    answers = [guarded.observe(step, 50.0, 1.0, taken=False) for step in (21, 22, 23)]
    assert [answer.do for answer in answers] == ["go_on", "go_on", "roll_back"]
    assert answers[2].kept_from == 17
    assert answers[2].details["since"] == 21
    assert answers[2].verdict.confidence == "likely"
    assert "3 of the last 3 steps could not be taken, last step 23: the loss is 50, above" in answers[2].message
    lost = guarded.state()
    guarded.load(state)
    guarded.rolled_back(lost)
    assert guarded.rate_factor == 0.5
    assert [guarded.observe(step, 50.0, 1.0, taken=False).do for step in (21, 22, 23)] == ["go_on", "go_on", "stop"]


def test_a_run_does_not_end_with_two_steps_that_could_not_be_taken():
    guarded = fed(policy(max_skips=8), 20)
    guarded.observe(21, math.nan, math.nan, taken=False)
    assert guarded.conclude(21) is None
    guarded.observe(22, math.nan, math.nan, taken=False)
    assert guarded.conclude(22).do == "roll_back"
    assert guarded.conclude(23) is None
    assert (
        "2 of the last 2 steps could not be taken, the last two among them: the loss is nan."
        in guarded.conclude(22).message
    )


def test_skips_that_lie_far_apart_are_not_added_up():
    guarded = fed(policy(), 20)
    for step in range(40, 400, 20):
        assert guarded.observe(step, math.nan, math.nan, taken=False).do == "go_on"


def test_large_gradients_beside_an_ordinary_loss_are_a_new_level():
    """A threshold that refuses them for ever would end a run that is in order."""
    guarded = fed(policy(), 20)
    kinds = [guarded.observe(step, 2.0, 40.0, taken=False).kind for step in (21, 22, 23)]
    assert kinds == ["step_skipped", "step_skipped", "guard_yields"]
    assert guarded.limits()[1] == math.inf
    for step in range(24, 40):
        assert guarded.observe(step, 2.0, 40.0, taken=True) is None
    assert guarded.limits()[1] == pytest.approx(4 * 40)


def test_a_verdict_names_where_the_gradient_broke():
    answer = policy().observe(5, 2.0, math.inf, taken=False, places=["head.weight"])
    assert answer.message.startswith("Step 5 was skipped: the gradient norm is inf, from the gradient of head.weight.")
    assert answer.verdict.confidence == "certain"
    assert answer.verdict.quantity == "grad_norm"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spike_threshold": 0.0}, "guard.spike_threshold must be positive, got 0.0"),
        ({"grad_norm_ratio": 0.5}, "guard.grad_norm_ratio must be at least 1, got 0.5"),
        ({"max_skips": -1}, "guard.max_skips must be at least 0, got -1"),
        ({"min_values": 17}, "guard.min_values must be at most guard.window, got 17 and 16"),
        ({"rollback_rate": 1.5}, r"guard.rollback_rate must lie in \(0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        policy(**settings)
