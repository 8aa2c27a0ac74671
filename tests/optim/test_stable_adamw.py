"""AdamW with update clipping, against the paper's algorithm in float64, and against AdamW where nothing is to be clipped."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from tameformer.finetune import layer_decay_groups
from tameformer.optim import OptimConfig, StableAdamW, optimizers
from tameformer.optim.stable_adamw import update_rms
from two_processes import in_two

SIZES = (1.0, 0.5, 3.0, 300.0, 1.0, 0.0)


def gradient(step, shape, dtype=torch.float64):
    torch.manual_seed(step)
    return torch.randn(shape, dtype=dtype) * SIZES[step]


def by_hand(start, *, lr, betas, eps, weight_decay):
    """Wortsman et al. 2023, algorithm 2, number by number; yields the weight and the root mean square after each step."""
    weight, m, v = list(start), [0.0] * len(start), [0.0] * len(start)
    for t in range(1, len(SIZES) + 1):
        g = gradient(t - 1, len(start)).tolist()
        share = [beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas]
        m = [share[0] * a + (1 - share[0]) * b for a, b in zip(m, g, strict=True)]
        v = [share[1] * a + (1 - share[1]) * b * b for a, b in zip(v, g, strict=True)]
        rms = math.sqrt(sum(b * b / max(a, eps**2) for a, b in zip(v, g, strict=True)) / len(g))
        rate = lr / max(1.0, rms)
        weight = [
            w - rate * weight_decay * w - rate * a / (math.sqrt(b) + eps) for w, a, b in zip(weight, m, v, strict=True)
        ]
        yield weight, rms


def test_equals_the_algorithm_of_the_paper():
    torch.manual_seed(9)
    start = torch.randn(7, dtype=torch.float64)
    settings = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    one, wide = nn.Parameter(start.clone()), nn.Parameter(start.clone().view(7, 1))
    together, absent = StableAdamW([one, wide], **settings), StableAdamW([nn.Parameter(start.clone())], **settings)
    seen = []
    for step, (expected, rms) in enumerate(by_hand(start.tolist(), **settings)):
        one.grad = gradient(step, 7)
        wide.grad = one.grad.clone().view(7, 1)
        together.step()
        absent.step()  # without a gradient nothing moves
        seen.append(rms)
        torch.testing.assert_close(one.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(wide.detach().view(7), one.detach(), rtol=0, atol=0)
    assert max(seen) > 1.8 > 0.7 > min(seen), seen  # some steps were clipped and some were not
    assert not absent.state


def test_is_adamw_where_nothing_outgrows_the_second_moment():
    """The corrected moments with the correction folded into the betas are AdamW's."""
    settings = {"lr": 0.05, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.2}
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 12).double().view(3, 4)) for _ in range(2))
    pair = StableAdamW([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(20):
        shrinking = gradient(0, (3, 4)) * 0.9**step  # the same signs, ever smaller: v is always above g squared
        for weight, optimizer in zip((ours, theirs), pair, strict=True):
            weight.grad = shrinking.clone()
            optimizer.step()
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


def test_one_tensor_that_is_clipped_leaves_the_others_alone():
    def run(spike):
        weights = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
        optimizer = StableAdamW(weights, lr=0.1, weight_decay=0.0)
        for step in range(6):
            for weight, size in zip(weights, (spike if step == 5 else 1.0, 1.0), strict=True):
                weight.grad = torch.full_like(weight, size)
            optimizer.step()
        return [weight.detach() for weight in weights]

    calm, spiked = run(1.0), run(1e4)
    assert torch.equal(calm[1], spiked[1])
    # 5 steps of 0.1, then 0.1 / RMS times m / sqrt(v), which is m / g.
    last = (1 - 0.9) / (1 - 0.9**6) * 0.1
    torch.testing.assert_close(spiked[0], torch.full((4,), -0.5 - last), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_too_small_to_square_are_compared_all_the_same(dtype):
    """1e-25 squared is 0 in fp32; with v = 0, eps stands in, and nothing is NaN."""
    rms = update_rms([torch.full((8,), 1e-25, dtype=dtype)], [torch.zeros(8, dtype=dtype)], eps=1e-20)
    assert rms.dtype == torch.float32
    torch.testing.assert_close(rms, torch.tensor([1e-5]), rtol=1e-2, atol=0)
    weight = nn.Parameter(torch.ones(8, dtype=dtype))
    optimizer = StableAdamW([weight])
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.dtype == dtype
    assert weight.isfinite().all()


def test_steps_of_parameters_that_join_late_are_counted_apart():
    weights = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = StableAdamW(weights, lr=0.1, weight_decay=0.0)
    for step in range(4):
        weights[0].grad = torch.ones(3)
        weights[1].grad = torch.ones(3) if step == 3 else None
        optimizer.step()
    torch.testing.assert_close(weights[1].detach(), torch.full((3,), -0.1))
    assert [optimizer.state[weight]["step"].item() for weight in weights] == [4, 1]


class Reads(TorchDispatchMode):
    """Which tensors the host asks for their value, which an accelerator would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.read = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_but_the_counts_which_are_on_the_processor():
    weights = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = StableAdamW(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones(3)
    with Reads() as reads:
        optimizer.step()
        float(torch.ones(1))  # would be seen
    assert [id(one) for one in reads.read[:-1]] == [id(optimizer.state[weight]["step"]) for weight in weights]


def test_rates_by_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(8), enable_nested_tensor=False)
    groups = layer_decay_groups(model, 0.5, lr=0.4, weight_decay=0.0)
    rates = {id(one): group["lr"] for group in groups for one in group["params"]}
    assert set(rates.values()) == {0.4, 0.2, 0.1, 0.05}
    before = [one.detach().clone() for one in model.parameters()]
    for one in model.parameters():
        one.grad = torch.randn_like(one)
    StableAdamW(groups).step()
    for one, old in zip(model.parameters(), before, strict=True):  # a first step is one rate long
        torch.testing.assert_close(
            (one.detach() - old).abs(), torch.full_like(old, rates[id(one)]), rtol=1e-3, atol=1e-6
        )


def test_a_closure_is_called_with_gradients_on():
    weight = nn.Parameter(torch.ones(2))
    optimizer = StableAdamW([weight], lr=0.1, weight_decay=0.0)

    def closure():
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    torch.testing.assert_close(weight.detach(), torch.full((2,), 0.9))


def test_named_in_a_configuration():
    config = OptimConfig(name="stable_adamw", peak_lr=0.3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    (optimizer,) = optimizers(nn.Linear(3, 3), config)
    assert isinstance(optimizer, StableAdamW)
    assert [(g["lr"], g["betas"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.3, (0.8, 0.95), 1e-6, decay) for decay in (0.2, 0.0)
    ]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"expected betas in \[0, 1\).*got \(0.9, 1.0\)"):
        StableAdamW([nn.Parameter(torch.ones(1))], betas=(0.9, 1.0))
    table = nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"dense gradients, got one of shape \(4, 2\) as torch.sparse_coo; build"):
        StableAdamW(table.parameters()).step()


def trained(wrap):
    """Six steps, of which the fourth meets a spike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))  # one process holds nothing of the last
    wrapped = wrap(model)
    optimizer = StableAdamW(model.parameters(), lr=0.01)
    for step in range(6):
        torch.manual_seed(step)
        hidden = wrapped(torch.randn(8, 4)).square() * (1e4 if step == 3 else 1.0)
        hidden.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [one.full_tensor() if hasattr(one, "full_tensor") else one for one in map(torch.detach, model.parameters())]


def sharded(model):
    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))


def of_a_rank(rank):
    return trained(sharded)


def test_of_a_sharded_weight_the_mean_is_over_all_of_it(tmp_path):
    expected = trained(lambda model: model)
    for (found,) in in_two((of_a_rank,), tmp_path):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
