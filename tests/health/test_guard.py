import json
import math

import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.errors import DivergedError
from tameformer.health import GuardConfig
from tameformer.health.policy import Policy

TIGHT = GuardConfig(window=16, min_values=8, max_skips=2, healthy_steps=3)


def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def batch(number, factor=1.0):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(number)) * factor


def learn(model, optimizer, guard, given) -> bool:
    loss = model(given).square().mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    taken = guard.step(loss, grad_norm=norm)
    if taken:
        optimizer.step()
    optimizer.zero_grad()
    return taken


def bits(model, optimizer):
    state = optimizer.state_dict()["state"]
    parts = [*model.state_dict().values(), *(value for each in state.values() for value in each.values())]
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 12])
def test_a_refused_step_leaves_no_trace_not_even_in_running_statistics(bad, at):
    (model, optimizer), (clean, clean_optimizer) = parts(), parts()
    guard, clean_guard = tame.Guard(model, optimizer), tame.Guard(clean, clean_optimizer)
    for number in range(20):
        if number == at:
            assert not learn(model, optimizer, guard, batch(99, bad))
        assert learn(model, optimizer, guard, batch(number))
        assert learn(clean, clean_optimizer, clean_guard, batch(number))
    assert guard.steps_skipped == 1
    assert bits(model, optimizer) == bits(clean, clean_optimizer)


def test_the_norm_is_measured_where_it_is_not_given():
    model, optimizer = parts()
    guard = tame.Guard(model, optimizer)
    model[0].weight.register_hook(lambda gradient: gradient * math.inf)
    loss = model(batch(0)).square().mean()
    loss.backward()
    assert not guard.step(loss)
    assert model[0].weight.grad is None


def test_spikes_are_events_and_a_resumed_guard_decides_alike(tmp_path):
    model, optimizer = parts()
    guard = tame.Guard(model, optimizer, output_dir=tmp_path, config=TIGHT)
    for number in range(12):
        assert learn(model, optimizer, guard, batch(number))
    again = tame.Guard(model, optimizer, config=TIGHT)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    before = bits(model, optimizer)[:2]
    for each in (guard, again):
        loss = model(batch(5)).square().mean() * 1e4
        loss.backward()
        assert not each.step(loss)
    assert bits(model, optimizer)[:2] == before
    assert again.state_dict() == guard.state_dict()
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["step"], event["kind"], event["quantity"]) == (13, "step_skipped", "loss")


def test_too_many_refusals_end_the_run_or_go_back():
    model, optimizer = parts()
    guard = tame.Guard(model, optimizer, config=TIGHT)
    for number in range(10):
        learn(model, optimizer, guard, batch(number))
    kept, answers = guard.state_dict(), []

    def roll_back(answer):
        answers.append(answer)
        back.load_state_dict(kept)

    back = tame.Guard(model, optimizer, config=TIGHT, roll_back=roll_back)
    back.load_state_dict(kept)
    for _ in range(2):
        learn(model, optimizer, guard, batch(0, math.nan))
        learn(model, optimizer, back, batch(0, math.nan))
    with pytest.raises(
        DivergedError, match=r"3 of the last 3 steps could not be taken, .* Go on from a checkpoint of step 7"
    ):
        learn(model, optimizer, guard, batch(0, math.nan))
    assert not learn(model, optimizer, back, batch(0, math.nan))
    assert answers[0].kept_from == 7
    assert back.rate_factor == 0.5
    assert back.steps_done == 10


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ValueError, match="the optimizer holds no parameter of this Sequential"):
        tame.Guard(parts()[0], parts()[1])


def test_going_back_begins_the_count_of_skips_anew():
    policy = Policy(GuardConfig(max_skips=2, max_rollbacks=3))

    def refused(step: int) -> str:
        answer = policy.observe(step, math.nan, 1.0, taken=False)
        assert answer is not None
        return answer.do

    assert [refused(step) for step in (1, 4)] == ["go_on", "go_on"]
    kept = policy.state()  # the checkpoint that the run goes back to
    assert refused(20) == "roll_back"
    lost = policy.state()
    policy.load(kept)
    policy.rolled_back(lost)
    assert [refused(step) for step in (5, 6, 7)] == ["go_on", "go_on", "roll_back"]
