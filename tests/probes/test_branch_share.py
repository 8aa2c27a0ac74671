import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from tameformer.models import EncoderConfig, encoder
from tameformer.nn.residual import PostNorm, PreNorm
from tameformer.patch import Observation
from tameformer.probes.branch_share import BranchShare, branch_share, dependency_profile


def by_definition(residual, branch):
    residual, branch = residual.detach().double().square().mean(), branch.detach().double().square().mean()
    return float(branch / (branch + residual))


@given(
    ratio=st.sampled_from([0.0, 1e-4, 0.3, 1.0, 50.0]),
    scale=st.sampled_from([1e-15, 1.0, 1e15]),
    seed=st.integers(0, 1000),
)
def test_the_share_agrees_with_its_definition(ratio, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    residual, branch = (torch.randn(1, 5, 6, generator=generator) * scale for _ in range(2))
    share = float(branch_share(residual, branch * ratio))
    assert share == pytest.approx(by_definition(residual, branch * ratio), rel=1e-5)
    assert float(branch_share(branch * ratio, residual)) == pytest.approx(1 - share, abs=3e-7)


def test_the_ends_and_what_is_not_finite():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert branch_share(one, zero) == 0
    assert branch_share(zero, one) == 1
    assert branch_share(zero, zero) == 0
    for bad in (torch.nan, torch.inf):
        assert branch_share(one * bad, one).isnan()
        assert branch_share(one, one * bad).isnan()


def test_half_precision_is_measured_in_float32():
    residual, branch = torch.randn(1, 64, 64).bfloat16(), torch.randn(1, 64, 64).bfloat16()
    share = branch_share(residual, branch)
    assert share.dtype == torch.float32
    assert float(share) == pytest.approx(by_definition(residual, branch), rel=1e-5)


def test_the_profile_is_what_follows_branch_by_branch():
    shares = torch.tensor([0.9, 0.0, 0.3, 1.0, 0.25], dtype=torch.float64)
    profile = dependency_profile(shares)
    for i in range(5):
        for j in range(6):
            expected = 1.0 if j == 0 else float(shares[j - 1]) if j <= i + 1 else 0.0
            for later in range(j, i + 1):
                expected *= 1 - float(shares[later])
            assert float(profile[i, j]) == pytest.approx(expected)
    torch.testing.assert_close(profile.sum(1), torch.ones(5, dtype=torch.float64))


def test_the_profile_is_the_mixture_of_a_real_residual_stream():
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(200, 400, generator=generator) * scale for scale in (1.0, 0.7, 2.0, 0.3)]
    stream, shares = parts[0], []
    for branch in parts[1:]:
        shares.append(branch_share(stream, branch))
        stream = stream + branch
        stream = stream / stream.std()  # a norm after the sum: the parts inside shrink alike
        # and so the branches of the next sums stand beside a stream of variance 1
    profile = dependency_profile(torch.stack(shares))[-1]
    mixed = torch.stack([(stream * part).mean() / part.square().mean().sqrt() for part in parts])
    torch.testing.assert_close(mixed.square(), profile, atol=0.01, rtol=0)


@pytest.mark.parametrize("residual", ["pre", "post"])
def test_our_layers(residual):
    torch.manual_seed(0)
    model = encoder(EncoderConfig(dim=16, num_layers=2, num_heads=2, residual=residual, max_length=8), vocab_size=11)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, (PreNorm, PostNorm)):
            module.drop.register_forward_hook(lambda drop, args, output, name=name: expected.update({name: output}))
            module.register_forward_pre_hook(lambda module, args, name=name: expected.update({f"{name}.in": args[0]}))
    probe = BranchShare()
    with Observation(model, [probe]).watching():
        model(torch.arange(16).reshape(2, 8) % 11)
    names = [f"stack.layers.{layer}.{part}" for layer in range(2) for part in ("attention", "feed_forward")]
    assert list(probe.read()) == [f"diag/branch_share/{name}" for name in names]
    for name in names:
        share = float(probe.read()[f"diag/branch_share/{name}"])
        assert share == pytest.approx(by_definition(expected[f"{name}.in"], expected[name]), rel=1e-5)


def test_a_few_tokens_stand_for_all():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 1), torch.randn(3, 5, 16)
    probe = BranchShare(tokens=3)
    with Observation(model, [probe]).watching():
        model(x)
    first = model.layers[0]
    branch = first.self_attn(x, x, x)[0]
    chosen = [0, 6, 12]  # of 15; a spacing of 5 would take first tokens only
    expected = by_definition(x.flatten(0, 1)[chosen], branch.flatten(0, 1)[chosen])
    assert float(probe.read()["diag/branch_share/layers.0.self_attn"]) == pytest.approx(expected, rel=1e-5)
    assert len(probe.read()) == 2


def test_bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model, probe, expected = BertModel(config).eval(), BranchShare(), {}
    for name, module in model.named_modules():
        if name.endswith(("attention.output", ".output")):
            module.register_forward_pre_hook(
                lambda module, args, name=name: expected.update({name: (args[1], module.dense(args[0]))})
            )
    with Observation(model, [probe]).watching():
        model(torch.arange(16).reshape(2, 8) % 11)
    assert len(expected) == len(probe.read()) == 4
    for name, (residual, branch) in expected.items():
        assert float(probe.read()[f"diag/branch_share/{name}"]) == pytest.approx(
            by_definition(residual.detach(), branch.detach()), rel=1e-5
        )


def test_gpt2():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()
    seen, probe = {}, BranchShare()
    block = model.transformer.h[0]
    block.register_forward_pre_hook(lambda module, args: seen.update(stream=args[0]))
    block.attn.register_forward_hook(lambda module, args, output: seen.update(attention=output[0]))
    block.mlp.register_forward_hook(lambda module, args, output: seen.update(mlp=output))
    with torch.no_grad(), Observation(model, [probe]).watching():
        model(torch.arange(16).reshape(2, 8) % 11)
    between = seen["stream"] + seen["attention"]
    expected = {
        "diag/branch_share/transformer.h.0.attn": by_definition(seen["stream"], seen["attention"]),
        "diag/branch_share/transformer.h.0.mlp": by_definition(between, seen["mlp"]),
    }
    assert {key: float(value) for key, value in probe.read().items()} == pytest.approx(expected, rel=1e-5)
