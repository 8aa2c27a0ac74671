"""Two processes over gloo, wrapped in DDP or sharded by FSDP2, fine-tune as one does; what cannot work there is refused."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tameformer.errors import PatchError
from tameformer.finetune import GradualUnfreezing, freeze, layer_decay_groups, mixout, prior_decay, reinit_top
from two_processes import in_two

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")
DATA = torch.linspace(-1, 1, 4 * 3 * 8).sin().view(4, 3, 8)


def model_of():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))


def sharded(model):
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model[1].layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def itself(model):
    return model


def fine_tuned(wrap, data, *, halfway=lambda model: None):
    """Everything at once, in the order of the documentation; returns the model and what wraps it."""
    model = model_of()
    mixout(model, 0.5)
    freeze(model, up_to=0)
    wrapped = wrap(model)
    groups = layer_decay_groups(model, 0.5, lr=0.1, weight_decay=0.0)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    prior_decay(model, optimizer, decay=2.0)
    for step in range(4):
        torch.manual_seed(step)  # equal masks in all processes, so that their mean is that of one
        wrapped(data).square().sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            halfway(model)
    return model, wrapped, [(group["name"], group["lr"]) for group in groups]


def state(model):
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def with_ddp(rank):
    model, wrapped, rates = fine_tuned(DistributedDataParallel, DATA.chunk(2)[rank])
    torch.manual_seed(rank)
    outputs = wrapped(DATA)  # each process draws for itself
    with pytest.raises(PatchError, match=r"DistributedDataParallel waits for the gradients.*find_unused_parameters"):
        GradualUnfreezing(wrapped, lambda step: step)
    return state(model), rates, outputs.detach()


def with_whole_priors(model):
    """As a state that was saved by one process brings them."""
    for module in model.modules():
        for name, prior in list(module.named_buffers(recurse=False)):
            if name.endswith("_prior"):
                assert prior.to_local().numel() == prior.numel() // 2
                setattr(module, name, prior.full_tensor())


def with_fsdp(rank):
    model, _, rates = fine_tuned(sharded, DATA.chunk(2)[rank], halfway=with_whole_priors)
    with pytest.raises(PatchError, match="has a prior already"):
        prior_decay(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(PatchError, match=r"is sharded over processes; patch the model first, then shard it"):
        mixout(sharded(model_of()))
    with pytest.raises(PatchError, match=r"is sharded over processes; re-initialize first"):
        reinit_top(sharded(model_of()), layers=1)
    return state(model), rates, torch.tensor(float(rank))


def test_two_processes_fine_tune_as_one(tmp_path):
    model, _, rates = fine_tuned(itself, DATA)
    expected, start = state(model), state(model_of())
    assert (expected["2.weight"] - start["2.weight"]).abs().max() > 1e-2
    for first, second in zip(*in_two((with_ddp, with_fsdp), tmp_path), strict=True):
        assert first[1] == second[1] == rates
        assert first[0].keys() == second[0].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(first[0][name], second[0][name]), name
            torch.testing.assert_close(first[0][name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert not torch.equal(first[2], second[2])
