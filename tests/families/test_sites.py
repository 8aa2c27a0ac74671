"""A look at the places where attention was seen tells what a look at the whole pass tells, of every family."""

import pytest
import torch

from tameformer.patch import Observation, Observer
from tameformer.patch.attention_pass import AttentionPass
from zoo import FAMILIES, attention_alone, run_steps


class Calls(Observer):
    """Keeps the calls, how they were looked for, and how many hooks the model carried meanwhile."""

    def __init__(self, observation):
        self.observation, self.calls = observation, []

    def on_attention(self, call):
        self.calls.append(call)
        self.is_narrow = isinstance(self.observation._pass, AttentionPass)
        self.hooks = sum(len(module._forward_pre_hooks) for module in self.observation.model.modules())


def observed(model, inputs, observation):
    calls = Calls(observation)
    observation.observers = (calls,)
    torch.manual_seed(1)
    with observation.watching():
        model(**inputs)
    return calls


def test_a_second_look_sees_the_same_with_fewer_hooks(family):
    model, inputs = family.model(), family.inputs()
    observation = Observation(model, [], sequences=None)
    whole, narrow = observed(model, inputs, observation), observed(model, inputs, observation)
    assert [call.layer for call in narrow.calls] == [call.layer for call in whole.calls]
    assert {call.layer for call in whole.calls} == set(family.attention_layers())
    for one, other in zip(narrow.calls, whole.calls, strict=True):
        for name in ("query", "key", "value", "mask", "logits"):
            tensors = getattr(one, name), getattr(other, name)
            assert (tensors[0] is None) == (tensors[1] is None)
            assert tensors[0] is None or torch.equal(*tensors)
        assert (one.is_causal, one.scale) == (other.is_causal, other.scale)
    if whole.calls and all(call.layer for call in whole.calls):  # the root's own calls take the whole
        assert narrow.is_narrow > whole.is_narrow
        assert narrow.hooks < whole.hooks or whole.hooks == 2  # one module inside the root, no more


SETTINGS = {
    "bf16": {"autocast": True},
    "checkpointed": {"use_reentrant": False},
    "checkpointed, reentrant": {"use_reentrant": True},
    "every sequence": {"sequences": None},
}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["gpt2-sdpa", "bart-eager"])
def test_a_run_looked_at_there_is_the_same_run(name, setting):
    family, options = FAMILIES[name], dict(SETTINGS[setting])
    checkpoint, runs = "use_reentrant" in options, []
    reentrant = options.pop("use_reentrant", None)
    for watched in (False, True):
        model = family.model()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        runs.append(run_steps(model, family.inputs(), watched=watched, steps=6, probes=attention_alone, **options))
    assert runs[0].same_run(runs[1])
    assert list(runs[1].readings) == [2, 4, 6]
    for values in runs[1].readings.values():
        layers = {key.split("/", 2)[2] for key in values if key.startswith("diag/attention_entropy/")}
        assert layers == set(family.attention_layers())
