import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.models import (
    Architecture,
    UniversalConfig,
    UniversalDecoderConfig,
    ponder_cost,
    universal_decoder,
    universal_encoder,
)
from tameformer.nn.halting import Halting

TOKENS = torch.arange(18).view(2, 9)
STEPS = 6  # enough for some to run on while others have halted long since
SMALL = {"dim": 16, "num_heads": 4, "num_steps": STEPS, "max_length": 16}


def built(halting="fixed", **settings):
    torch.manual_seed(0)
    model = (
        universal_decoder(UniversalDecoderConfig(halting=halting, **SMALL, **settings), vocab_size=30).double().eval()
    )
    if halting == "adaptive":
        nn.init.normal_(model.embedding.weight)
        nn.init.normal_(model.stack.halting.weight)  # positions that halt at different steps
        nn.init.constant_(model.stack.halting.bias, -1.0)
    return model


def test_fixed_steps_are_a_stack_of_one_layer_with_added_vectors():
    model = built(positions="sinusoidal")
    stack, x = model.stack, model.embedding(TOKENS)
    for step in range(STEPS):
        x = stack.layers[0](stack.positions(x) + stack.steps[step], is_causal=True)
    torch.testing.assert_close(model(TOKENS), model.embedding.logits(stack.norm(x)), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in stack.layers.parameters()) == sum(p.numel() for p in stack.layers[0].parameters())


def test_halting_equals_a_loop_over_positions():
    """Graves 2016, equations 4 to 8, with the states of halted positions kept."""
    model = built("adaptive")
    stack, halting = model.stack, model.stack.halting
    x = model.embedding(TOKENS)
    states, running, states_of = x, torch.ones(2, 9, dtype=torch.bool), []
    spent, steps, rest = (torch.zeros(2, 9, dtype=torch.float64) for _ in range(3))
    result = torch.zeros_like(x)
    for step in range(STEPS):
        moved = stack.layers[0](stack.positions(states) + stack.steps[step], is_causal=True)
        states = torch.where(running[..., None], moved, states)
        states_of.append(states)
        for b in range(2):
            for i in range(9):
                if not running[b, i]:
                    continue
                p = torch.sigmoid(states[b, i] @ halting.weight + halting.bias[0])
                steps[b, i] += 1
                if spent[b, i] + p > 0.99 or step == STEPS - 1:
                    p, running[b, i] = 1 - spent[b, i], False
                    rest[b, i] = p
                result[b, i] += p * states[b, i]
                spent[b, i] += p
    expected = model.embedding.logits(stack.norm(result))
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-11, atol=1e-11)
    assert steps.min() + 2 <= steps.max()
    torch.testing.assert_close(ponder_cost(model), (steps + rest).mean(), rtol=1e-12, atol=1e-12)
    real = torch.arange(9).expand(2, 9) < 4
    torch.testing.assert_close(ponder_cost(model, real), (steps + rest)[real].mean(), rtol=1e-12, atol=1e-12)


def test_the_cost_has_a_gradient_that_makes_positions_halt_sooner():
    model = built("adaptive").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    costs = []
    for _ in range(30):
        model(TOKENS)
        cost = ponder_cost(model)
        costs.append(cost.item())
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
    assert costs[-1] < costs[0] - 0.1
    halting = Halting(4)
    nn.init.constant_(halting.bias, 20.0)
    done, x = halting.begin(torch.zeros(1, 2, 4)), torch.zeros(1, 2, 4)
    assert halting.share(x, done, is_last=False).tolist() == [[1.0, 1.0]]  # one step can be enough
    assert not done.running.any()


def test_an_accelerator_is_never_waited_for_and_needless_steps_change_nothing():
    """The meta device refuses to tell a value, as an accelerator would have to be waited for."""
    model = built("adaptive")
    steps = []
    model.stack.layers[0].register_forward_hook(lambda *_: steps.append(1))
    nn.init.normal_(model.stack.halting.weight, std=0.01)
    nn.init.constant_(model.stack.halting.bias, 1.0)
    with torch.no_grad():
        soon = model(TOKENS)
        taken = len(steps)
        to_the_end = model(TOKENS, cache=model.new_cache())
    assert taken < STEPS == len(steps) - taken
    assert to_the_end.equal(soon)
    elsewhere = model.to("meta")
    loss = elsewhere(TOKENS.to("meta")).sum() + ponder_cost(elsewhere, TOKENS.to("meta") > 3)
    loss.backward()
    assert loss.is_meta
    assert len(steps) == taken + 2 * STEPS


@pytest.mark.parametrize("halting", ["fixed", "adaptive"])
def test_every_model_promise(halting):
    model = built(halting)
    model(TOKENS).square().sum().backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in unreached if not name.endswith("key.bias")] == []
    cache = model.new_cache()
    pieces = [model(piece, cache=cache) for piece in TOKENS.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(TOKENS), rtol=1e-10, atol=1e-10)
    config = UniversalDecoderConfig(halting=halting, **SMALL)
    again = Architecture.from_plain(Architecture.of(config, vocab_size=30).to_plain()).build().double().eval()
    again.load_state_dict(model.state_dict())
    assert again(TOKENS).equal(model(TOKENS))
    encoder = universal_encoder(UniversalConfig(halting=halting, **SMALL), vocab_size=30)
    assert encoder(TOKENS, real=TOKENS > 3).isfinite().all()


def test_probes_and_stabilizers_work():
    model = built("adaptive").float()
    report = tame.diagnose(model, TOKENS)
    assert "diag/attention_entropy/stack.layers.0.attention.branch/0" in report.values
    before = model(TOKENS)
    with tame.sigma_reparam(model) as handle:
        assert len(handle.names) == 6
        assert model(TOKENS).isfinite().all()
    assert model(TOKENS).equal(before)


def test_wrong_settings():
    with pytest.raises(ValueError, match="call the model first"):
        ponder_cost(built())
    with pytest.raises(ValueError, match=r"a threshold between 0 and 1, got 1\.0"):
        universal_decoder(UniversalDecoderConfig(halting="adaptive", halting_threshold=1.0), vocab_size=9)
    with pytest.raises(ValueError, match="even dim for the vectors of the steps, got 9"):
        UniversalConfig(dim=9, num_heads=3)
