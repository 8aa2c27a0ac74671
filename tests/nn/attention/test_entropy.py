import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tameformer.nn.attention import entropy as module
from tameformer.nn.attention.entropy import attention_entropy, centred_keys
from tameformer.nn.attention.entropy_blocks import entropy_by_blocks
from tameformer.nn.attention.logsumexp import entropy_by_difference, entropy_from_logsumexp

LENGTH, HEADS, HEAD_DIM = 96, 4, 16
KINDS = [
    "none",
    "causal",
    "padding",
    "causal+padding",
    "per head",
    "per row",
    "two axes",
    "rows only",
    "additive padding",
    "additive full",
    "additive least number",
    "alibi",
    "alibi+causal+padding",
    "relative",
    "soft-cap",
    "soft-cap+causal+padding",
    "grouped",
    "grouped+causal+per head",
    "cross",
    "cross causal",
    "longer query causal",
]


def reference(query, key, mask=None, is_causal=False, scale=None, score_mod=None):
    """Every score in float64, one row at a time, only over the keys that are seen."""
    batch, heads, length, head_dim = query.shape
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    scores = query.double() @ key.double().mT * (head_dim**-0.5 if scale is None else scale)
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        seen &= mask
    elif mask is not None:
        seen &= mask > -60000
        scores = scores + mask.double()
    if score_mod is not None:
        scores = score_mod(scores)
    if is_causal:
        seen &= torch.arange(scores.shape[3]) <= torch.arange(length)[:, None]
    entropy = torch.full((batch, heads, length), math.nan, dtype=torch.float64)
    for at in itertools.product(range(batch), range(heads), range(length)):
        row = scores[at][seen[at]]
        if len(row):
            log_weights = row - row.logsumexp(0)
            entropy[at] = -(log_weights.exp() * log_weights).sum()
    return entropy


def call(kind, largest, seed=0):
    """Arguments of a call of this kind whose largest dot product, after scaling, is `largest`."""
    torch.manual_seed(seed)
    keys = {"cross": 57, "cross causal": 130, "longer query causal": 40}.get(kind, LENGTH)
    kv_heads = 2 if "grouped" in kind else HEADS
    query, key = torch.randn(2, HEADS, LENGTH, HEAD_DIM), torch.randn(2, kv_heads, keys, HEAD_DIM)
    query *= largest / (query @ key.repeat_interleave(HEADS // kv_heads, 1).mT * HEAD_DIM**-0.5).abs().max()
    options = {"is_causal": "causal" in kind}
    padding = torch.arange(keys) < torch.tensor([keys, keys // 3])[:, None, None, None]
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(keys)).abs()
    if kind in ("padding", "causal+padding", "soft-cap+causal+padding"):
        options["mask"] = padding
    if "per head" in kind:
        options["mask"] = torch.rand(2, HEADS, LENGTH, keys) < 0.5
    if kind == "per row":
        options["mask"] = torch.rand(2, 1, LENGTH, keys) < 0.02  # some rows see one key, some none
    if kind == "two axes":
        options["mask"] = torch.rand(LENGTH, keys) < 0.5
    if kind == "rows only":
        options["mask"] = torch.rand(2, 1, LENGTH, 1) < 0.5
    if kind == "additive padding":
        options["mask"] = torch.zeros(padding.shape).masked_fill(~padding, -torch.inf)
    if kind == "additive full":
        options["mask"] = torch.zeros(2, 1, LENGTH, keys).masked_fill(distance > 9, -torch.inf)
    if kind == "additive least number":
        options["mask"] = torch.zeros(2, 1, LENGTH, keys).masked_fill(~padding, torch.finfo(torch.float32).min)
    if "alibi" in kind:
        options["mask"] = -(2.0 ** -torch.arange(1, HEADS + 1))[:, None, None] * distance
    if kind == "alibi+causal+padding":
        options["mask"] = options["mask"].masked_fill(~padding, -torch.inf)
    if kind == "relative":
        options["mask"] = (3 * torch.randn(HEADS, 32))[:, distance.clamp(max=31)]
    if "soft-cap" in kind:
        options["score_mod"] = lambda scores: 30 * torch.tanh(scores / 30)
    return query, key, options


@pytest.fixture
def fused_everywhere(monkeypatch):
    """The fused way is an accelerator's; a CPU has a kernel to test it with."""
    monkeypatch.setattr(module, "_FUSED_DEVICES", ("cpu", "cuda"))


@pytest.fixture(params=["as on a CPU", "as on an accelerator"])
def both_devices(request):
    if request.param == "as on an accelerator":
        request.getfixturevalue("fused_everywhere")


def error(entropy, expected):
    """The largest difference; the same rows must be NaN."""
    assert torch.equal(entropy.isnan(), expected.isnan())
    return (entropy.double() - expected).nan_to_num().abs().max().item()


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_a_float64_loop(kind):
    for largest in (0.5, 7.0, 50.0):
        query, key, options = call(kind, largest)
        entropy = attention_entropy(query, key, **options)
        assert error(entropy, reference(query, key, **options)) <= 1e-5
        assert (entropy[~entropy.isnan()] >= 0).all()
        assert not entropy.signbit().any()


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_inputs_cost_nothing_but_their_own_rounding(kind):
    query, key, options = call(kind, 50.0)
    query, key = query.bfloat16(), key.bfloat16()
    entropy = attention_entropy(query, key, **options)
    assert entropy.dtype == torch.float32
    assert error(entropy, reference(query, key, **options)) <= 1e-4


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("kind", ["none", "causal+padding", "alibi", "grouped"])
def test_logits_of_340(kind):
    query, key, options = call(kind, 340.0)
    entropy = attention_entropy(query, key, **options)
    assert error(entropy, reference(query, key, **options)) <= 1e-4
    assert (entropy >= 0).all()


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "additive full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collapsed_attention(kind, dtype):
    _, _, options = call(kind, 1.0)
    directions = torch.linalg.qr(torch.randn(2, HEADS, HEAD_DIM, HEAD_DIM)).Q
    key = directions[:, :, torch.arange(LENGTH) % HEAD_DIM]
    key[:, :, HEAD_DIM:] *= 0.3  # the first key in each direction wins by far
    query = (50 * HEAD_DIM**0.5 * key / key.norm(dim=-1, keepdim=True)).to(dtype)
    key = key.to(dtype)
    expected = reference(query, key, **options)
    assert expected.nanmean() < 0.5
    assert expected.nan_to_num(99.0).min() < 1e-9
    entropy = attention_entropy(query, key, **options)
    assert error(entropy, expected) <= 1e-5
    assert (entropy >= 0).all()


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "per row", "relative"])
@pytest.mark.parametrize("offset", [10.0, 300.0])
def test_a_common_mode_of_the_keys_costs_no_accuracy(kind, offset):
    query, key, options = call(kind, 5.0)
    key = key + offset * torch.randn(HEADS, 1, HEAD_DIM)
    assert error(attention_entropy(query, key, **options), reference(query, key, **options)) <= 1e-5


@pytest.mark.parametrize("kind", ["none", "causal", "padding", "causal+padding", "grouped", "cross causal"])
def test_both_ways_agree_where_both_apply(kind):
    query, key, options = call(kind, 4.0)
    mask = options.pop("mask", None)
    fused = entropy_from_logsumexp(query, centred_keys(key), visible_keys=mask, scale=0.25, **options)
    blocks = entropy_by_blocks(query, key, visible=mask, scale=0.25, **options)
    torch.testing.assert_close(fused, blocks, rtol=0, atol=4e-6, equal_nan=True)
    assert not torch.equal(fused, blocks)  # they are two computations


class Operators(TorchDispatchMode):
    """The names of the operators that ran, and the number of elements of the largest tensor they returned."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.usefixtures("fused_everywhere")
@pytest.mark.parametrize(("largest", "fused"), [(1.0, True), (50.0, False)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_memory_stays_far_below_a_matrix_of_weights(largest, fused, is_causal):
    query, key = torch.randn(1, 2, 2048, 16), torch.randn(1, 2, 2048, 16)
    query *= largest / (4 * query.norm(dim=-1).max() * key.norm(dim=-1).max() / 16)
    with Operators() as ran:
        entropy = attention_entropy(query, key, is_causal=is_causal)
    assert entropy.isfinite().all()
    assert ("_scaled_dot_product_flash_attention_for_cpu" in ran.names) == fused
    assert ran.largest <= 2048 * 2048 / 15


@pytest.mark.parametrize("budget", [1, 70, 96 * 5, 96 * 96 * 2, 96 * 96 * 9])
@pytest.mark.parametrize("kind", ["grouped+causal+per head", "alibi+causal+padding", "cross causal", "rows only"])
def test_the_size_of_a_block_changes_nothing(kind, budget, monkeypatch):
    query, key, options = call(kind, 20.0)
    whole = attention_entropy(query, key, **options)
    monkeypatch.setattr("tameformer.nn.attention.entropy_blocks._CPU_BLOCK_SCORES", budget)
    torch.testing.assert_close(attention_entropy(query, key, **options), whole, rtol=0, atol=6e-6, equal_nan=True)


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("largest", [1.0, 40.0])
def test_one_visible_key_gives_zero_and_none_gives_nan(largest):
    query, key, _ = call("none", largest)
    mask = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    mask[0, ..., 7] = True
    for given in (mask, mask.expand(2, 1, LENGTH, LENGTH), torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        entropy = attention_entropy(query, key, given)
        assert (entropy[0] == 0).all()
        assert entropy[1].isnan().all()
    assert (attention_entropy(query, key, is_causal=True)[:, :, 0] == 0).all()


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["causal", "alibi+causal+padding", "soft-cap+causal+padding"])
def test_a_value_that_is_not_finite_marks_the_rows_that_see_it_and_no_other(kind, bad):
    query, key, options = call(kind, 5.0)
    clean = attention_entropy(query, key, **options)
    broken = key.clone()
    broken[0, 1, 20, 3] = bad
    entropy = attention_entropy(query, broken, **options)
    assert entropy[0, 1, 20:].isnan().all()
    entropy[0, 1, 20:] = clean[0, 1, 20:]
    torch.testing.assert_close(entropy, clean, rtol=0, atol=1e-5, equal_nan=True)
    broken = query.clone()
    broken[1, 0, 5, 0] = bad
    entropy = attention_entropy(broken, key, **options)
    assert entropy[1, 0, 5].isnan()
    entropy[1, 0, 5] = clean[1, 0, 5]
    torch.testing.assert_close(entropy, clean, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("largest", [2.0, 40.0])
def test_garbage_in_hidden_keys_is_not_seen(largest):
    query, key, options = call("padding", largest)
    clean = attention_entropy(query, key, **options)
    for garbage in (1e6, math.nan, math.inf):
        dirty = key.where(options["mask"].mT, garbage)
        torch.testing.assert_close(attention_entropy(query, dirty, **options), clean, rtol=0, atol=1e-6)


def test_nan_in_a_bias_marks_its_rows_only():
    query, key, _ = call("none", 2.0)
    bias = torch.zeros(1, 1, LENGTH, LENGTH)
    bias[..., 4, 9] = math.nan
    entropy = attention_entropy(query, key, bias)
    assert entropy[:, :, 4].isnan().all()
    assert error(entropy[:, :, 5:], reference(query, key)[:, :, 5:]) <= 1e-5


def precisions():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = None
    return overall, *(backend.fp32_precision for backend in backends)


def set_everywhere():
    torch.set_float32_matmul_precision("medium")


def set_for_cuda():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def set_for_all_backends():
    torch.backends.fp32_precision = "tf32"


def leave():
    pass


@pytest.fixture
def _precision_put_back():
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("both_devices")
@pytest.mark.parametrize("setting", [leave, set_everywhere, set_for_cuda, set_for_all_backends])
@pytest.mark.usefixtures("_precision_put_back")
def test_float32_inside_whatever_is_set_outside_and_settings_are_put_back(setting):
    query, key, _ = call("none", 20.0)
    expected = attention_entropy(query, key)
    inside = []

    def spy(scores):
        inside.append((precisions(), torch.is_autocast_enabled("cpu"), scores.dtype))
        return scores

    setting()
    before = precisions()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_entropy(query, key), expected)
        attention_entropy(query, key, score_mod=spy)
        assert torch.is_autocast_enabled("cpu")
    assert {(autocast, dtype) for _, autocast, dtype in inside} == {(False, torch.float32)}
    assert {precision for (_, *both), *_ in inside for precision in both} <= {"ieee", "none"}
    # Where the older setting was used it is the one to change: CUDA refuses products where the two disagree.
    assert all(overall == "highest" for (overall, *_), *_ in inside)
    assert precisions() == before
    with pytest.raises(ZeroDivisionError):
        attention_entropy(query, key, score_mod=lambda scores: 1 // 0)
    assert precisions() == before


@pytest.mark.usefixtures("both_devices")
def test_float64_stays_float64_and_no_input_is_changed():
    query, key, options = call("relative", 20.0)
    query, key = query.double().requires_grad_(), key.double()
    before = query.detach().clone(), key.clone(), options["mask"].clone()
    entropy = attention_entropy(query, key, **options)
    assert error(entropy, reference(query.detach(), key, **options)) <= 1e-12
    assert not entropy.requires_grad
    assert all(torch.equal(*pair) for pair in zip(before, (query, key, options["mask"]), strict=True))


@pytest.mark.parametrize("scale", [1.0, 0.01, -0.3, 0.0])
def test_scale_is_the_factor_on_the_scores(scale):
    query, key, _ = call("none", 10.0)
    assert error(attention_entropy(query, key, scale=scale), reference(query, key, scale=scale)) <= 1e-5


def test_permuting_the_keys_changes_nothing():
    query, key, options = call("padding", 3.0)
    order = torch.randperm(LENGTH)
    shuffled = attention_entropy(query, key[:, :, order], options["mask"][..., order])
    torch.testing.assert_close(shuffled, attention_entropy(query, key, **options), rtol=0, atol=4e-6)


@pytest.mark.usefixtures("both_devices")
def test_no_keys_and_no_queries():
    assert attention_entropy(torch.ones(2, 2, 3, 4), torch.ones(2, 2, 0, 4)).isnan().all()
    assert attention_entropy(torch.ones(2, 2, 0, 4), torch.ones(2, 2, 3, 4)).shape == (2, 2, 0)


def test_wrong_calls_are_refused():
    query, key = torch.ones(2, 8, 5, 4), torch.ones(2, 8, 6, 4)
    with pytest.raises(ValueError, match="multiple of the key heads, got 8 and 3"):
        attention_entropy(query, key[:, :3])
    with pytest.raises(ValueError, match=r"= \(2, 8, 5, 6\), got \(2, 6\); a padding mask"):
        attention_entropy(query, key, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(1, 2, 8, 5, 6\)"):
        attention_entropy(query, key, torch.ones(1, 2, 8, 5, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected score_mod to keep the shape"):
        attention_entropy(query, key, score_mod=lambda scores: scores.sum(-1))


@pytest.mark.parametrize("kind", ["none", "alibi", "relative", "soft-cap"])
@pytest.mark.parametrize(("largest", "bound"), [(5.0, 1e-4), (16.0, 2e-4), (50.0, 5e-4)])
def test_difference_of_log_sum_exp(kind, largest, bound):
    query, key, options = call(kind, largest)
    scores = query @ key.mT * HEAD_DIM**-0.5
    if "mask" in options:
        scores = scores + options["mask"]
    if "score_mod" in options:
        scores = options["score_mod"](scores)
    expected = reference(query, key, **options)
    assert error(entropy_by_difference(lambda tau: (tau * scores).logsumexp(-1)), expected) <= bound
    in_double = entropy_by_difference(lambda tau: (tau * scores.double()).logsumexp(-1), step=1e-3)
    assert error(in_double, reference(query, key, **options)) <= 1e-5


@pytest.mark.parametrize("step", [0.0, 0.5, -0.1, math.nan])
def test_a_step_that_cannot_work_is_refused(step):
    with pytest.raises(ValueError, match="expected a step above 0 and below"):
        entropy_by_difference(lambda tau: torch.zeros(1), step=step)


def test_a_cpu_does_without_the_fused_way():
    with Operators() as ran:
        attention_entropy(torch.zeros(1, 1, 8, 4), torch.ones(1, 1, 8, 4))
    assert "_scaled_dot_product_flash_attention_for_cpu" not in ran.names


@pytest.mark.usefixtures("fused_everywhere")
def test_the_fused_way_is_taken_only_where_it_is_exact():
    # One direction for all: the sum over p s is as large as it can be, where the fused call errs most.
    for seed, reach in itertools.product(range(4), (7.0, 12.0, 16.0)):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(HEAD_DIM, generator=generator)
        query, key = (torch.randn(1, 1, 512, 1, generator=generator) * direction for _ in range(2))
        key = key - key.mean(2, keepdim=True)
        query = query * reach / (query.norm(dim=-1).max() * key.norm(dim=-1).max() * HEAD_DIM**-0.5)
        scores = query.double() @ key.double().mT * HEAD_DIM**-0.5
        expected = torch.special.entr(scores.softmax(-1)).sum(-1)
        assert error(attention_entropy(query, key), expected) <= 1e-5
        with Operators() as ran:
            attention_entropy(query, key)
        blocks = "_softmax" in ran.names or "softmax" in ran.names
        assert blocks == (reach > module._SIZE_LIMIT)
