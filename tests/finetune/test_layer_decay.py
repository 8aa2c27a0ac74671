"""Each family against a table written by hand: how far from the output each part is."""

import pytest
import torch
from torch import nn

from tameformer.errors import PatchError
from tameformer.finetune import GradualUnfreezing, Place, freeze, layer_decay_groups, one_by_one, places, scale_rates
from tameformer.stabilizers import stabilize

# Parts by prefix, from the first that fits; 3 is the embeddings of models with 2 layers.
ABOVE = {
    "bert": {"bert.embeddings": 3, "bert.encoder.layer.0": 2, "bert.encoder.layer.1": 1, "": 0},
    "roberta": {"roberta.embeddings": 3, "roberta.encoder.layer.0": 2, "roberta.encoder.layer.1": 1, "": 0},
    "distilbert": {"distilbert.embed": 3, "distilbert.transformer.layer.0": 2, "distilbert.transformer.layer.1": 1, "": 0},
    "vit": {"vit.embeddings": 3, "vit.layers.0": 2, "vit.layers.1": 1, "": 0},
    "deit": {"deit.embeddings": 3, "deit.layers.0": 2, "deit.layers.1": 1, "": 0},
    "gpt2": {"transformer.w": 3, "transformer.h.0": 2, "transformer.h.1": 1, "transformer.ln_f": 0},
    "llama": {"model.embed_tokens": 3, "model.layers.0": 2, "model.layers.1": 1, "": 0},
    "t5": {"shared": 3, "encoder.block.0": 2, "encoder.block.1": 1, "decoder.block.0": 2, "decoder.block.1": 1, "": 0},
    "bart": {
        "model.shared": 4, "model.encoder.embed": 4, "model.encoder.layernorm_embedding": 4, "model.decoder.embed": 4,
        "model.decoder.layernorm_embedding": 4, "model.encoder.layers.0": 2, "model.encoder.layers.1": 1,
        "model.decoder.layers.0": 3, "model.decoder.layers.1": 2, "model.decoder.layers.2": 1, "classification_head": 0,
    },
    "torch": {"encoder.layers.0": 2, "encoder.layers.1": 1, "decoder.layers.0": 2, "decoder.layers.1": 1, "": 0},
    "encoder": {"embedding": 3, "positions": 3, "stack.layers.0": 2, "stack.layers.1": 1, "stack.norm": 0},
    "decoder": {"embedding": 3, "positions": 3, "stack.layers.0": 2, "stack.layers.1": 1, "stack.norm": 0},
    "encoder-decoder": {
        "embedding": 3, "source_positions": 3, "target_positions": 3, "encoder.layers.0": 2, "encoder.layers.1": 1,
        "decoder.layers.0": 2, "decoder.layers.1": 1, "": 0,
    },
    "vision": {"stem": 3, "positions": 3, "stack.layers.0": 2, "stack.layers.1": 1, "": 0},
}  # fmt: skip
over_families = pytest.mark.parametrize("family", ABOVE)
pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")


@over_families
def test_every_parameter_is_where_the_table_has_it_and_in_one_group(family, build):
    model = build(family)
    found = places(model)
    expected = {
        name: next(above for prefix, above in ABOVE[family].items() if name.startswith(prefix)) for name in found
    }
    assert {name: place.above for name, place in found.items()} == expected
    assert set(found) == {name for name, _ in model.named_parameters()}

    groups = layer_decay_groups(model, 0.5, lr=8.0, weight_decay=0.1)
    grouped = [name for group in groups for name in group["param_names"]]
    assert sorted(grouped) == sorted(found)
    for group in groups:
        assert {8.0 * 0.5 ** expected[name] for name in group["param_names"]} == {group["lr"]}
        assert all(one.ndim >= 2 for one in group["params"]) or group["weight_decay"] == 0
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert all(decay == 0 for name, decay in decays.items() if "norm" in name.lower() or name.endswith("bias"))
    assert 0.1 in decays.values()

    optimizer = torch.optim.SGD(model.named_parameters(), lr=8.0)
    scale_rates(model, [optimizer], 0.5)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert rates == {name: group["lr"] for group in groups for name in group["param_names"]}


def test_lists_side_by_side_in_one_module_run_one_after_the_other():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            for stage in ("first", "second"):
                setattr(self, stage, nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))))

    found = places(Stages())
    assert [place.above for place in found.values()] == [4, 4, 3, 3, 2, 2, 1, 1]


def test_any_scheduler_scales_the_rates(build):
    model = build("bert")
    optimizer = torch.optim.AdamW(layer_decay_groups(model, 0.5, lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1 * (step + 1))
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["head"] == pytest.approx(0.3)
    assert rates["bert.encoder.layer.0"] == pytest.approx(0.3 * 0.25)


def test_patches_and_frozen_layers_are_grouped_as_what_they_are(build):
    model = build("bert")
    stabilize(model, "sigma_reparam")
    freeze(model, up_to=1)
    groups = layer_decay_groups(model, lr=1.0)
    grouped = [name for group in groups for name in group["param_names"]]
    assert sorted(grouped) == sorted(name for name, one in model.named_parameters() if one.requires_grad)
    assert not any(name.startswith(("bert.embeddings", "bert.encoder.layer.0")) for name in grouped)
    assert any("layer.1" in name and name.endswith("gamma") for name in grouped)


def test_what_has_no_layers_wants_places():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(PatchError, match=r"Sequential has no repeated layers.*place_of="):
        layer_decay_groups(model, lr=1.0)
    found = {name: Place(name, 0, 1 - int(name[0])) for name, _ in model.named_parameters()}
    groups = layer_decay_groups(model, 0.5, lr=1.0, place_of=lambda model: found)
    assert {name: group["lr"] for group in groups for name in group["param_names"]} == {
        "0.weight": 0.5,
        "0.bias": 0.5,
        "1.weight": 1.0,
        "1.bias": 1.0,
    }
    del found["1.bias"]
    with pytest.raises(ValueError, match=r"says nothing about 1\.bias"):
        layer_decay_groups(model, lr=1.0, place_of=lambda model: found)


@pytest.mark.parametrize("rate", [0.0, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(rate, build):
    with pytest.raises(ValueError, match="expected a rate above 0 and at most 1"):
        layer_decay_groups(build("encoder"), rate, lr=1.0)


@over_families
def test_frozen_layers_and_back(family, build):
    model = build(family)
    found = places(model)
    with freeze(model, up_to=1) as handle:
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        assert frozen == set(handle.names)
        assert frozen == {name for name, place in found.items() if place.below < 1 and place.above}
    assert all(one.requires_grad for one in model.parameters())
    freeze(model, up_to=2).bake()
    assert not all(one.requires_grad for one in model.parameters())


def test_freezing_more_than_there_is_is_refused(build):
    with pytest.raises(ValueError, match="expected up_to from 0 to 2, the number of layers, got 3"):
        freeze(build("bert"), up_to=3)
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))})
    with pytest.raises(PatchError, match="leaves nothing of ModuleDict to learn"):
        freeze(model, up_to=2)
    assert all(one.requires_grad for one in model.parameters())


def test_unfreezing_is_a_function_of_the_step_and_moves_nothing_else(build):
    model = build("bert")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    unfreezing = GradualUnfreezing(model, lambda step: one_by_one(step, steps_per_layer=2))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.1, weight_decay=0.1)
    tokens = torch.arange(1, 9).view(2, 4)
    for step in (0, 3, 5, 0, 7):
        unfreezing.at(step)
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        model(input_ids=tokens, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        found = places(model)
        moved = {found[name].above for name, one in model.named_parameters() if not torch.equal(one, before[name])}
        assert moved == {above for above in range(4) if above <= step // 2}
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad
    unfreezing.remove()
    assert sum(not one.requires_grad for one in model.parameters()) == 1
