"""Optimizers without marks for the compiler: torch's own to the bit, and nothing of the compiler is imported for them."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from tameformer.optim import LARS, StableAdamW
from tameformer.optim.eager import eager

CLASSES = [torch.optim.AdamW, torch.optim.Adam, torch.optim.RAdam, torch.optim.SGD, torch.optim.Muon, LARS, StableAdamW]


def steps(optimizer_class, events):
    """Three steps, one of them with a closure, over a saved and loaded state; the weight after each."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    optimizer = optimizer_class([weight], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: events.append("stepped"))

    def closure():
        optimizer.zero_grad()
        loss = (weight**3).sum()
        loss.backward()
        return loss

    for number in range(3):
        closure()
        loss = optimizer.step(closure) if number == 1 else optimizer.step()
        assert (loss is not None) == (number == 1)
        yield weight.detach().clone()
        state = optimizer.state_dict()
        optimizer = optimizer_class([weight], lr=0.3)
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_steps_are_those_of_the_original_to_the_bit(optimizer_class):
    told, told_of_original = [], []
    for ours, original in zip(
        steps(eager(optimizer_class), told), steps(optimizer_class, told_of_original), strict=True
    ):
        assert torch.equal(ours, original)
    assert told == told_of_original == ["stepped"]  # a hook belongs to one optimizer, here to the first
    assert eager(optimizer_class).__name__ == optimizer_class.__name__


def test_a_rate_that_is_differentiated_keeps_its_gradient():
    rate, start = torch.tensor(0.1, requires_grad=True), nn.Parameter(torch.ones(2))
    weight = start.clone()
    weight.grad = torch.ones(2)
    eager(torch.optim.SGD)([weight], lr=rate, differentiable=True).step()
    weight.sum().backward()
    assert rate.grad == -2.0


def test_the_configurations_optimizers_need_no_compiler():
    script = """if True:
        import sys, torch
        from tameformer.optim import OptimConfig, optimizers
        for name in sys.argv[1:]:
            model = torch.nn.Linear(4, 4)
            for optimizer in optimizers(model, OptimConfig(name=name)):
                model(torch.ones(2, 4)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                optimizer.load_state_dict(optimizer.state_dict())
        print("torch._dynamo" in sys.modules)
    """
    names = ["adamw", "adam", "radam", "stable_adamw", "sgd", "lars", "muon"]
    done = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
