import math

import pytest
import torch
from torch import nn

from tameformer.errors import PatchError
from tameformer.finetune import mixout, places, reinit_top

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")
HUGGING_FACE = ["bert", "roberta", "distilbert", "vit", "deit", "gpt2", "llama", "t5", "bart"]
OTHERS = ["torch", "encoder", "decoder", "encoder-decoder", "vision"]


def trained(model):
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(3.0 + torch.arange(one.numel()).view_as(one) / one.numel())
    return model


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("family", [*HUGGING_FACE, *OTHERS])
def test_the_top_is_new_and_the_rest_keeps_its_bits(family, layers, build):
    model = trained(build(family))
    before = {name: one.clone() for name, one in model.named_parameters()}
    state = torch.get_rng_state()
    names = reinit_top(model, layers=layers, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(names) == {name for name, place in places(model).items() if place.above <= layers}
    after = dict(model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(names)
    again = trained(build(family))
    reinit_top(again, layers=layers, seed=7)
    assert all(torch.equal(one, after[name]) for name, one in again.named_parameters())
    if family in HUGGING_FACE:  # the library's own initializer, with all it does
        fresh = dict(build(family, seed=7).named_parameters())
        assert all(torch.equal(after[name], fresh[name]) for name in names)


def test_gpt2_scales_what_ends_a_branch_by_depth(build):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_embd=64, n_layer=8, n_head=2, bos_token_id=1, eos_token_id=1, initializer_range=0.5
    )
    model = trained(transformers.GPT2Model(config))
    reinit_top(model, layers=2)
    assert model.h[7].mlp.c_proj.weight.std().item() == pytest.approx(0.5 / math.sqrt(16), rel=0.05)
    assert model.h[7].mlp.c_fc.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert model.h[5].mlp.c_fc.weight.min() >= 3.0


def test_ours_take_what_they_are_built_with(build):
    model = trained(build("decoder"))
    reinit_top(model, layers=1)
    top = model.stack.layers[1]
    assert top.feed_forward.branch.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.15)
    assert top.feed_forward.branch.up.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not top.feed_forward.branch.up.bias.any()
    assert (top.attention.norm.weight == 1).all()
    model = trained(build("vision"))
    reinit_top(model, layers=1)
    bound = math.sqrt(6 / (16 + 64))
    assert bound * 0.9 < model.stack.layers[1].feed_forward.branch.up.weight.abs().max() <= bound
    assert not model.pooling.score.any()


def test_the_head_can_be_kept(build):
    names = reinit_top(build("bert"), layers=1, head=False)
    assert names
    assert all(name.startswith("bert.encoder.layer.1.") for name in names)


def test_another_initializer_and_what_needs_one(build):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
            self.pool_scale = nn.Parameter(torch.ones(2))

    with pytest.raises(ValueError, match=r"pool_scale: Own has no reset_parameters; give fresh="):
        reinit_top(Own(), layers=1)
    model = trained(Own())
    reinit_top(model, layers=1, fresh=lambda model: type(model)())
    assert model.layers[1][0].weight.max() < 1 < model.layers[0][0].weight.min()


class TimmLike(nn.Module):
    """The names and the way to start of timm's vision transformer."""

    def __init__(self, knows_how=True):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)))
        self.head = nn.Linear(4, 2)
        if knows_how:
            self.init_weights = self._init_weights

    def _init_weights(self, mode=""):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.constant_(module.weight, 7.0)


@pytest.mark.parametrize("knows_how", [True, False])
def test_a_model_that_starts_itself_is_asked_and_parts_that_stay_need_no_way(knows_how):
    model = trained(TimmLike(knows_how))
    assert reinit_top(model, layers=1) == ("blocks.1.0.weight", "blocks.1.0.bias", "head.weight", "head.bias")
    assert model.cls_token.min() >= 3.0
    assert (model.head.weight == 7.0).all() == knows_how
    assert model.blocks[1][0].bias.abs().max() <= 0.5  # torch's own start


def test_a_part_that_the_model_itself_forgets_is_named_and_nothing_changes():
    model = TimmLike()
    model.blocks[1].register_parameter("gamma", nn.Parameter(torch.ones(4)))
    before = {name: value.clone() for name, value in trained(model).state_dict().items()}
    with pytest.raises(ValueError, match=r"^blocks\.1\.gamma: Sequential has no reset_parameters; give fresh="):
        reinit_top(model, layers=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_too_many_layers_and_patched_ones_are_refused(build):
    with pytest.raises(ValueError, match="expected layers from 0 to 2, how many there are, got 3"):
        reinit_top(build("bert"), layers=3)
    model = build("bert")
    mixout(model)
    with pytest.raises(PatchError, match="is part of a patch; remove it, re-initialize, and patch then"):
        reinit_top(model, layers=1)
