import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from tameformer.models import DecoderConfig, decoder
from tameformer.nn.attention import MultiHeadAttention
from tameformer.nn.feed_forward import FeedForward
from tameformer.nn.norms import layer_norm
from tameformer.nn.residual import PostNorm
from tameformer.patch import Observation, blocks
from tameformer.probes.rank_residual import (
    RankResidual,
    composite_rank_residual,
    rank_residual,
    token_cosine,
)


def residual_by_loop(x):
    tokens = [token.double() for token in x]
    mean = sum(tokens) / len(tokens)
    off = sum(float((token - mean).square().sum()) for token in tokens)
    return (off / sum(float(token.square().sum()) for token in tokens)) ** 0.5


def cosine_by_loop(x):
    x = x.double()
    pairs = [
        x[s] @ x[t] / (x[s].norm() * x[t].norm())
        for s in range(len(x))
        for t in range(len(x))
        if s != t and x[s].any() and x[t].any()
    ]
    return float(sum(pairs)) / len(pairs)


@given(
    spread=st.sampled_from([1e-4, 1e-2, 1.0, 100.0]),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 999),
)
def test_agreement_with_slow_loops_also_near_collapse(spread, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, 1, 8, generator=generator) + spread * torch.randn(2, 6, 8, generator=generator)) * scale
    for index in range(2):
        assert float(rank_residual(x)[index]) == pytest.approx(residual_by_loop(x[index]), rel=1e-3, abs=2e-7)
        assert float(token_cosine(x)[index]) == pytest.approx(cosine_by_loop(x[index]), abs=2e-6)


def test_known_cases():
    alike, alternating = torch.randn(1, 8).expand(6, 8), torch.tensor([[1.0, 2.0], [-1.0, -2.0]]).repeat(3, 1)
    assert rank_residual(alike) < 2e-7
    assert rank_residual(alternating) == 1
    assert float(token_cosine(alike)) == pytest.approx(1)
    assert float(token_cosine(alternating)) == pytest.approx(-1 / 5)
    assert float(token_cosine(torch.eye(4))) == pytest.approx(0, abs=1e-7)
    assert float(rank_residual(torch.eye(4))) == pytest.approx(0.75**0.5)
    # one direction, different lengths: cosine 1, but not collapsed to one token
    ray = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    assert float(token_cosine(ray)) == pytest.approx(1)
    assert float(rank_residual(ray)) == pytest.approx((1 / 5) ** 0.5)


def test_zero_tokens_have_no_direction():
    x = torch.randn(5, 8)
    padded = torch.cat([x, torch.zeros(3, 8)])
    torch.testing.assert_close(token_cosine(padded), token_cosine(x))
    assert token_cosine(torch.zeros(3, 8)) == rank_residual(torch.zeros(3, 8)) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_entries_are_reported(bad):
    x = torch.randn(2, 4, 8)
    x[1, 2, 3] = bad
    for measure in (rank_residual, token_cosine, composite_rank_residual):
        assert measure(x)[0].isfinite()
        assert measure(x)[1].isnan()


def test_half_precision_is_measured_in_float32_and_float64_keeps_its_own():
    x = torch.randn(6, 8).bfloat16()
    assert float(rank_residual(x)) == pytest.approx(residual_by_loop(x), rel=1e-5)
    assert float(token_cosine(x)) == pytest.approx(cosine_by_loop(x), abs=1e-6)
    near = torch.ones(6, 8, dtype=torch.float64) + 1e-12 * torch.randn(6, 8, dtype=torch.float64)
    assert float(rank_residual(near)) == pytest.approx(residual_by_loop(near), rel=1e-3)


def test_the_composite_norm_is_that_of_the_paper():
    def norm(matrix):
        return (torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(matrix, torch.inf)) ** 0.5

    x = torch.randn(2, 6, 8) + 1
    torch.testing.assert_close(composite_rank_residual(x), norm(x - x.mean(1, keepdim=True)) / norm(x))


def ours():
    return decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, max_length=8), vocab_size=11)


def bert():
    heads = {"num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, intermediate_size=32, **heads))


@pytest.mark.parametrize("build", [ours, bert])
def test_each_layer_of_a_model_is_measured(build):
    torch.manual_seed(0)
    model, outputs = build(), {}
    for name, block in blocks(model).items():
        block.register_forward_hook(
            lambda module, args, output, name=name: outputs.update(
                {name: (output[0] if isinstance(output, tuple) else output).detach()}
            )
        )
    first, everything = RankResidual(), RankResidual(sequences=None)
    with Observation(model, [first, everything]).watching():
        model(torch.arange(24).reshape(3, 8) * 5 % 11)
    assert len(outputs) == 2
    assert len(first.read()) == 4
    for name, output in outputs.items():
        residuals, cosines = [residual_by_loop(x) for x in output], [cosine_by_loop(x) for x in output]
        for probe, count in ((first, 1), (everything, 3)):
            values = probe.read()
            assert float(values[f"diag/rank_residual/{name}"]) == pytest.approx(
                sum(residuals[:count]) / count, rel=1e-5
            )
            assert float(values[f"diag/token_cosine/{name}"]) == pytest.approx(sum(cosines[:count]) / count, abs=1e-6)


def test_of_long_sequences_a_few_tokens_are_looked_at():
    torch.manual_seed(0)
    model, outputs = ours(), []
    model.stack.layers[0].register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    probe = RankResidual(tokens=3)
    with Observation(model, [probe]).watching():
        model(torch.arange(16).reshape(2, 8) * 5 % 11)
    chosen = outputs[0][0, [0, 3, 6]]
    values = {key: float(value) for key, value in probe.read().items()}
    assert values["diag/rank_residual/stack.layers.0"] == pytest.approx(residual_by_loop(chosen), rel=1e-5)
    assert values["diag/token_cosine/stack.layers.0"] == pytest.approx(cosine_by_loop(chosen), abs=1e-6)


def test_a_single_token_gives_nothing_and_a_step_forgets_the_one_before():
    model, probe = ours(), RankResidual()
    observation = Observation(model, [probe])
    with observation.watching():
        model(torch.zeros(2, 4, dtype=torch.long))
    assert probe.read()
    with observation.watching():
        model(torch.zeros(2, 1, dtype=torch.long))
    assert not probe.read()


class NoSkip(nn.Module):
    """norm(branch(x))."""

    def __init__(self, dim, branch, *, norm, drop):
        super().__init__()
        self.branch, self.norm = branch, norm(dim)

    def forward(self, x):
        return self.norm(self.branch(x))


def collapse(placement, *, feed_forward, dtype=torch.float32, seeds=3, dim=128, depth=12):
    """Rank residual of 64 random tokens before and after each of 12 fresh layers, the median of some seeds."""
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        layers = []
        for _ in range(depth):
            branches = [MultiHeadAttention(dim, 4)]
            branches += [FeedForward(dim, 4 * dim, activation=F.relu)] if feed_forward else []
            placed = [placement(dim, branch, norm=layer_norm, drop=nn.Identity()) for branch in branches]
            layers.append(nn.Sequential(*placed))
        model, probe = nn.Sequential(*layers).to(dtype), RankResidual()
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        x = torch.randn(1, 64, dim).to(dtype)
        with torch.no_grad(), Observation(model, [probe]).watching():
            model(x)
        values = [probe.read()[f"diag/rank_residual/{layer}"] for layer in range(depth)]
        runs.append(torch.stack([rank_residual(x)[0].float(), *values]))
    return torch.stack(runs).median(0).values


def test_attention_alone_collapses_and_skips_prevent_it():
    attention = collapse(NoSkip, feed_forward=False)
    both = collapse(NoSkip, feed_forward=True)
    skip = collapse(PostNorm, feed_forward=False)
    full = collapse(PostNorm, feed_forward=True)
    for run in (attention, both, skip, full):
        assert float(run[0]) == pytest.approx((1 - 1 / 64) ** 0.5, abs=3e-3)  # random tokens
    # float32 ends at about 2e-7, its rounding
    assert (attention[4:] < 1e-6).all()
    assert (both[4:] < 1e-6).all()
    assert skip[12] > 0.05
    assert (both[1:4] < attention[1:4]).all()  # deeper, both lie on the floor
    assert (torch.maximum(attention, both)[1:] < full[1:]).all()
    assert (full[1:] < skip[1:]).all()


def test_in_float64_the_fall_goes_on_faster_with_every_layer():
    attention = collapse(NoSkip, feed_forward=False, dtype=torch.float64).log()
    slopes = -attention.diff()[:4]
    assert (slopes[1:] > 1.5 * slopes[:-1]).all()
    assert attention[4] < -16  # 1e-7, below what float32 can show
    assert attention[6] < -32  # 1e-14
