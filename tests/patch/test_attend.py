import copy
import pickle
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tameformer.errors import PatchError
from tameformer.patch.attend import attention_by_logits, check_calls_torch, open_attention

MASK = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
MASK[:, :, 2] = False  # a query without a key
BIAS = torch.linspace(-2, 2, 280).view(2, 4, 5, 7)
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "bool": {"attn_mask": MASK},
    "float": {"attn_mask": BIAS},
    "float-mask": {"attn_mask": BIAS.masked_fill(~MASK, -torch.inf)},
    "smallest": {"attn_mask": torch.zeros(2, 1, 5, 7).masked_fill(~MASK, torch.finfo(torch.float32).min)},
}


def heads(kv_heads=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 4, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 6))
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_by_logits_is_torchs(case, kv_heads):
    given = dict(CASES[case])
    if "attn_mask" in given and given["attn_mask"].dtype != torch.bool:
        given["attn_mask"] = given["attn_mask"].double()
    inputs = heads(kv_heads)
    expected = F.scaled_dot_product_attention(*inputs, **given, enable_gqa=True)
    wanted = torch.autograd.grad(expected.square().sum(), inputs)
    mask = given.pop("attn_mask", None)
    output, weights = attention_by_logits(*inputs, mask=mask, **given)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), inputs), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights @ inputs[2].repeat_interleave(4 // kv_heads, 1), expected)


def test_dropout_scales_what_is_left():
    torch.manual_seed(0)
    plain, dropped = (attention_by_logits(*heads(), dropout=p)[1] for p in (0.0, 0.5))
    kept = dropped != 0
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


def test_half_precision_is_rounded_once():
    """Logits of 100 in float16 and bfloat16: from the product on everything is in float32."""
    for dtype in (torch.float16, torch.bfloat16):
        query, key, value = (10 * part.detach().to(dtype) for part in heads())
        output, weights = attention_by_logits(query, key, value)
        logits = ((query * 8**-0.5) @ key.transpose(-2, -1)).float()
        assert output.dtype == weights.dtype == dtype
        assert torch.equal(weights, logits.softmax(-1).to(dtype))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = (part.view(*x.shape[:2], 2, 4).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class Silent(Attention):
    def forward(self, x):
        return self.project(x)


class Failing(Attention):
    def forward(self, x):
        super().forward(x)
        raise KeyboardInterrupt


class Count:
    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, *, mask, is_causal, scale):
        assert query.shape == key.shape == (3, 2, 5, 4)
        self.calls += 1


X = torch.linspace(-1, 1, 120).view(3, 5, 8)


def opened(module, undo, transform=None):
    attention = open_attention(undo, module, "attention")
    attention.transform = transform
    attention.watchers.append(Count())
    return attention


def halve(logits):
    return logits / 2


def test_only_the_modules_own_calls_are_seen():
    module, other = Attention(), Attention()
    with ExitStack() as undo:
        count = opened(module, undo).watchers[0]
        plain = module(X)
        other(X)
        assert count.calls == 1
        vars(module)["forward"].transform = halve
        assert not torch.allclose(module(X), plain)
        with torch.no_grad():
            module.project.weight[:8] *= 2  # twice the queries, half the logits
            module.project.bias[:8] *= 2
        torch.testing.assert_close(module(X), plain)
    assert "forward" not in vars(module)


def test_another_forward_is_kept():
    module = Attention()
    mine = module.forward = lambda x: 3 * Attention.forward(module, x)
    expected = module(X)
    with ExitStack() as undo:
        opened(module, undo)
        torch.testing.assert_close(module(X), expected, rtol=0, atol=0)
    assert vars(module)["forward"] is mine
    undo = ExitStack()
    opened(module, undo)
    module.forward = mine
    with pytest.raises(PatchError, match="attention was replaced by other means"):
        undo.close()


def test_a_module_that_calls_something_else_is_told_of():
    module = Silent()
    with ExitStack() as undo:
        opened(module, undo)
        with pytest.raises(PatchError, match=r"attention was to call .* model\.set_attn_implementation\('sdpa'\)"):
            module(X)


def test_nothing_is_left_after_an_interrupt():
    module = Failing()
    with ExitStack() as undo:
        opened(module, undo)
        with pytest.raises(KeyboardInterrupt):
            module(X)
        assert torch._C._len_torch_function_stack() == 0
    assert torch._C._len_torch_function_stack() == 0


def test_a_copy_has_its_own():
    module = Attention()
    with ExitStack() as undo:
        count = opened(module, undo).watchers[0]
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin(X)
            twin(X)
            assert vars(twin)["forward"].module is twin
            assert vars(twin)["forward"].watchers[0].calls == 2
            with torch.no_grad():
                twin.project.weight.zero_()
            assert not torch.equal(twin(X), module(X))
        assert count.calls == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_gives_the_same_gradients(use_reentrant):
    module, x = Attention(), X.clone().requires_grad_()
    with ExitStack() as undo:
        count = opened(module, undo, halve).watchers[0]
        plain = torch.autograd.grad(module(x).square().sum(), module.parameters())
        assert count.calls == 1
        checkpoint(module, x, use_reentrant=use_reentrant).square().sum().backward()
        assert count.calls == 3
    torch.testing.assert_close([p.grad for p in module.parameters()], list(plain), rtol=0, atol=0)


class Configured(Attention):
    class config:
        _attn_implementation = "eager"


def test_a_model_that_is_set_to_attend_otherwise_is_refused():
    check_calls_torch(Attention(), "attention", "soft_cap")
    with pytest.raises(
        PatchError, match=r"soft_cap needs .* attention is on eager; .*set_attn_implementation\('sdpa'\)"
    ):
        check_calls_torch(Configured(), "attention", "soft_cap")
