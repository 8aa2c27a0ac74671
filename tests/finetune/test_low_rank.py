import pytest
import torch
from torch import nn

from tameformer.errors import PatchError
from tameformer.finetune import layer_decay_groups
from tameformer.finetune.low_rank import lora
from tameformer.patch import is_linear

pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:enable_nested_tensor"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
INPUTS = {
    "bert": lambda: {"input_ids": torch.arange(8).view(2, 4)},
    "gpt2": lambda: {"input_ids": torch.arange(8).view(2, 4)},
    "llama": lambda: {"input_ids": torch.arange(1, 9).view(2, 4)},
    "encoder": lambda: {"tokens": torch.arange(8).view(2, 4)},
    "vision": lambda: {"images": torch.linspace(0, 1, 128).view(2, 1, 8, 8)},
}


def output(model, family):
    out = model.eval()(**INPUTS[family]())
    return (out if isinstance(out, torch.Tensor) else out.logits).detach()


def tuned(model, family):
    groups = layer_decay_groups(model, lr=0.1)
    assert sorted(id(one) for group in groups for one in group["params"]) == sorted(
        id(one) for one in model.parameters() if one.requires_grad
    )
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for _ in range(2):
        out = model.train()(**INPUTS[family]())
        (out if isinstance(out, torch.Tensor) else out.logits).float().square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("family", INPUTS)
def test_it_starts_unchanged_learns_little_and_is_taken_back_or_baked(family, build):
    model = build(family)
    before, names = output(model, family), list(model.state_dict())
    frozen = {name: one.clone() for name, one in model.named_parameters()}
    handle = lora(model, rank=2)
    assert handle.new_parameters
    torch.testing.assert_close(output(model, family), before)
    tuned(model, family)
    assert (output(model, family) - before).abs().max() > 1e-4
    tuned_to = output(model, family)
    handle.bake()
    assert list(model.state_dict()) == names
    torch.testing.assert_close(output(model, family), tuned_to, rtol=1e-4, atol=1e-5)
    assert all(one.requires_grad for one in model.parameters())

    model = build(family)
    handle = lora(model, rank=2)
    tuned(model, family)
    handle.remove()
    assert list(model.state_dict()) == names
    inside = [name for name in names if ".0." in name and name in frozen]
    assert inside
    assert all(torch.equal(dict(model.named_parameters())[name], frozen[name]) for name in inside)


def test_what_does_not_fit_is_refused(build):
    with pytest.raises(PatchError, match=r"lm_head\.weight is tied to another weight"):
        lora(build("gpt2"), where=is_linear)
    with pytest.raises(ValueError, match="expected a rank of at least 1, got 0"):
        lora(build("bert"), rank=0)
    with pytest.raises(PatchError, match="has no repeated layers"):
        lora(nn.Linear(2, 2))
