"""Models that change their path from pass to pass: nothing is lost, and nothing is named wrongly."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tameformer.patch import Observation, Observer
from tameformer.patch.attention_pass import AttentionPass


class Mix(nn.Module):
    """Calls attention, without a parameter of its own."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Attention(nn.Module):
    """Projects and leaves the rest to `mix`."""

    def __init__(self, mix):
        super().__init__()
        self.project, self.mix = nn.Linear(4, 4), mix

    def forward(self, x):
        return self.mix(self.project(x))


class Model(nn.Module):
    """Runs the layers that `path` names; some call attention on their own, some through a module without parameters."""

    def __init__(self, path="abc", mixes=None):
        super().__init__()
        mixes = mixes or [Mix() for _ in "abc"]
        self.layers = nn.ModuleDict({name: Attention(mix) for name, mix in zip("abc", mixes, strict=True)})
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.path = path

    def forward(self, x):
        for name in self.path:
            if name == "!":
                raise RuntimeError("no")
            x = self.rest(self.layers[name](x) if name in self.layers else F.scaled_dot_product_attention(x, x, x))
        return x


class Layers(Observer):
    """Names of the layers that called in a pass."""

    seen = ""

    def on_begin(self):
        self.seen = ""

    def on_attention(self, call):
        self.seen += call.layer.removeprefix("layers.") or "-"


def seen_on(model, paths, observer=Layers):
    """What is seen in a pass along each of these paths, and whether the look was a narrow one."""
    layers = observer()
    observation = Observation(model, [layers])
    looks, seen = [], []
    first = model.rest[0].register_forward_hook(
        lambda *_: looks.append(isinstance(observation._pass, AttentionPass)) if len(looks) == len(seen) else None
    )
    for path in paths:
        model.path = path
        with observation.watching():
            model(torch.randn(2, 3, 4))
        seen.append(layers.seen)
        assert torch.overrides._get_current_function_mode() is None
    first.remove()
    return list(zip(seen, looks, strict=True))


def test_the_second_look_is_at_the_sites_and_every_tenth_at_the_whole():
    model = Model()
    looks = [narrow for _, narrow in seen_on(model, ["abc"] * 12)]
    assert looks == [False] + [True] * 9 + [False] + [True]


def test_a_layer_that_did_not_run_before_is_seen_when_it_does():
    paths = ["ab", "ab", "abc", "c", "c", "ba", "abc", "abc"]
    seen = seen_on(Model(), paths)
    assert [names for names, _ in seen] == paths
    #  What is unlike the last whole look is followed by a whole look.
    assert [narrow for _, narrow in seen] == [False, True, True, False, True, True, False, True]


def test_attention_of_the_root_takes_the_whole():
    assert seen_on(Model(), ["a-c"] * 3) == [("a-c", False)] * 3


def test_a_module_of_several_callers_is_named_after_the_one_that_calls():
    mix = Mix()
    seen = seen_on(Model(mixes=[mix] * 3), ["abc", "abc", "cab", "ab", "cc", "abc"])
    assert [names for names, _ in seen] == ["abc", "abc", "cab", "ab", "cc", "abc"]
    assert [narrow for _, narrow in seen] == [False, True, True, True, False, True]


def test_a_call_where_there_was_none_is_seen_within_ten_looks():
    class Late(Mix):
        attends = False

        def forward(self, x):
            return super().forward(x) if self.attends else x

    late = Late()
    model = Model(mixes=[Mix(), late, Mix()])
    layers = Layers()
    observation = Observation(model, [layers])
    seen = []
    for look in range(12):
        late.attends = look >= 3
        with observation.watching():
            model(torch.randn(2, 3, 4))
        seen.append(layers.seen)
    assert seen[:3] == ["ac"] * 3
    assert seen[10:] == ["abc"] * 2


def test_a_site_that_falls_silent_asks_for_the_whole_at_once():
    class Switch(Mix):
        attends = True

        def forward(self, x):
            return super().forward(x) if self.attends else x

    first, second = Switch(), Switch()
    second.attends = False
    model = Model(mixes=[first, second, Mix()])
    layers = Layers()
    observation = Observation(model, [layers])
    seen = []
    for look in range(4):
        first.attends, second.attends = look < 2, look >= 2
        with observation.watching():
            model(torch.randn(2, 3, 4))
        seen.append(layers.seen)
    assert seen == ["ac", "ac", "c", "bc"]


def test_observers_of_more_than_attention_look_at_the_whole():
    class More(Layers):
        def on_block(self, block, input, output): ...

    assert seen_on(Model(), ["abc"] * 3, More) == [("abc", False)] * 3


def test_evaluation_is_looked_at_as_a_whole():
    model = Model()
    with torch.no_grad():
        assert seen_on(model, ["abc"] * 3) == [("abc", False)] * 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [False, True])
def test_nothing_is_left_after_an_exception_inside_a_site(error, before):
    model = Model()
    layers = Layers()
    observation = Observation(model, [layers])
    with observation.watching():
        model(torch.randn(2, 3, 4))

    def fail(*args):
        raise error("no")

    mix = model.layers["b"].mix
    failing = mix.register_forward_pre_hook(fail) if before else mix.register_forward_hook(fail)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(error, match="no"), observation.watching():
        model(torch.randn(2, 3, 4))
    assert layers.seen == ("a" if before else "ab")
    assert torch.overrides._get_current_function_mode() is None
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    failing.remove()
    with observation.watching():
        model(torch.randn(2, 3, 4))
    assert layers.seen == "abc"


def test_an_exception_that_the_model_catches_ends_the_look_at_its_site():
    modes = []

    class Failing(Mix):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no")

    class Forgiving(Model):
        def forward(self, x):
            with contextlib.suppress(RuntimeError):
                self.layers["a"](x)
            modes.append(torch.overrides._get_current_function_mode())
            return self.layers["c"](self.layers["b"](x))

    model, layers = Forgiving(mixes=[Failing(), Mix(), Mix()]), Layers()
    observation = Observation(model, [layers])
    for _ in range(3):
        with observation.watching():
            model(torch.randn(2, 3, 4))
        assert layers.seen[0] + layers.seen[-1] == "ac"
    assert [mode is None for mode in modes] == [False, True, True]
