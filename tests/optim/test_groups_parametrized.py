import torch
from torch import nn
from torch.nn.utils import parametrize

from tameformer.optim import decay_groups


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1))

    def forward(self, weight):
        return self.scale * weight


class Knowing(Scaled):
    decayed_parameters = ("scale",)


def groups(part):
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    parametrize.register_parametrization(model[0], "weight", part)
    return {group["name"]: set(group["param_names"]) for group in decay_groups(model, weight_decay=0.1)}


def test_a_parametrized_weight_is_decayed_as_the_weight_it_is():
    found = groups(Scaled())
    assert found["decay"] == {"0.parametrizations.weight.original"}
    assert "0.parametrizations.weight.0.scale" in found["no_decay"]


def test_a_parametrization_says_what_weight_decay_is_meant_for():
    found = groups(Knowing())
    assert found["decay"] == {"0.parametrizations.weight.0.scale"}
    assert "0.parametrizations.weight.original" in found["no_decay"]
