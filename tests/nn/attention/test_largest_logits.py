import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tameformer.nn.attention import largest_logits as module
from tameformer.nn.attention.largest_logits import largest_logits


def slow(query, key, *, allowed=None, scale=None):
    """One pair at a time."""
    batch, heads, queries, width = query.shape
    served = heads // key.shape[1]
    found = torch.full((heads,), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                for j in range(key.shape[2]):
                    if allowed is None or allowed.expand(batch, heads, queries, key.shape[2])[b, h, i, j]:
                        product = query[b, h, i].double() @ key[b, h // served, j].double()
                        found[h] = torch.maximum(found[h], product * (width**-0.5 if scale is None else scale))
    return found


@given(
    seed=st.integers(0, 99),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    masked=st.sampled_from(["nothing", "causal", "bool", "every-head", "float", "smallest"]),
    block=st.sampled_from([1, 17, 1 << 22]),
)
def test_it_is_the_largest_of_all_pairs(seed, heads, queries, keys, masked, block):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads[0], queries, 3, generator=generator, dtype=torch.float64)
    key = torch.randn(2, heads[1], keys, 3, generator=generator, dtype=torch.float64)
    allowed, more = None, {}
    if masked == "causal":
        allowed, more = torch.ones(queries, keys, dtype=torch.bool).tril(), {"is_causal": True}
    elif masked != "nothing":
        shape = (2, heads[0] if masked == "every-head" else 1, 1 if masked == "bool" else queries, keys)
        allowed = torch.rand(shape, generator=generator) < 0.5
        bias = 100 * torch.randn(shape, generator=generator)
        low = -torch.inf if masked == "float" else torch.finfo(torch.float32).min
        more = {"mask": allowed if masked in ("bool", "every-head") else bias.masked_fill(~allowed, low)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_ELEMENTS", block)
        found = largest_logits(query, key, scale=0.7, **more)
    torch.testing.assert_close(found, slow(query, key, allowed=allowed, scale=0.7), rtol=1e-12, atol=1e-12)


def test_nan_and_infinity_are_told_of_unless_they_are_masked():
    query, key = torch.ones(1, 3, 2, 4), torch.ones(1, 3, 2, 4)
    query[:, 0, 1], key[:, 1, 0, 0] = torch.nan, torch.inf
    assert str(largest_logits(query, key).tolist()) == "[nan, inf, 2.0]"
    mask = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    mask[:, 0, 1], mask[:, 1, :, 0] = False, False
    assert largest_logits(query, key, mask=mask).tolist() == [2.0, 2.0, 2.0]


def test_nothing_to_attend_to():
    query = torch.ones(2, 3, 2, 4)
    mask = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    assert largest_logits(query, query, mask=mask).tolist() == [-torch.inf] * 3
    assert largest_logits(query[:0], query[:0]).tolist() == [-torch.inf] * 3


def test_memory_is_bounded():
    """A matrix of all logits would be 256 MiB."""
    query = torch.randn(1, 1, 8192, 4)
    shapes = []

    class Seen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                shapes.append(output.numel())
            return output

    with Seen():
        largest = largest_logits(query, query, is_causal=True)
    assert max(shapes) <= module.BLOCK_ELEMENTS
    assert largest >= query.square().sum(-1).max() / 2 * (1 - 1e-6)
