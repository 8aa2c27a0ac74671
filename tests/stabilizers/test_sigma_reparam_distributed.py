import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tameformer.errors import PatchError
from tameformer.stabilizers.sigma_reparam import SigmaReparam, sigma_reparam
from two_processes import in_two

DATA = torch.linspace(-1, 1, 24).view(4, 6)


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    sigma_reparam(model)
    return model


def train(run, parameters, data, *, parts=1):
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    for _ in range(3):
        for part in data.chunk(parts):
            (run(part).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model):
    values = {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in model.state_dict().items()
    }
    return {name: value.detach().clone() for name, value in values.items()}


def alone():
    model = model_of()
    train(model, model.parameters(), DATA)
    return state(model)


def with_ddp(rank):
    model = model_of()
    wrapped = DistributedDataParallel(model)
    train(wrapped, wrapped.parameters(), DATA.chunk(2)[rank])
    wrapped(DATA)
    (wrapped(DATA) - wrapped(2 * DATA)).square().mean().backward()  # broadcasts the buffers between the two
    with pytest.raises(PatchError, match="wrapped in DistributedDataParallel"):
        sigma_reparam(wrapped)
    return state(model)


def with_fsdp(rank):
    model = model_of()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, model.parameters(), DATA.chunk(2)[rank], parts=2)
    assert {int(one.updates) for one in model.modules() if isinstance(one, SigmaReparam)} == {3}
    plain = nn.Sequential(nn.Linear(6, 4))
    fully_shard(plain, mesh=mesh)
    with pytest.raises(PatchError, match=r"0\.weight is sharded"):
        sigma_reparam(plain)
    return state(model)


def test_two_processes_train_as_one(tmp_path):
    expected = alone()
    for first, second in zip(*in_two((with_ddp, with_fsdp), tmp_path), strict=True):
        assert first.keys() == second.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)
