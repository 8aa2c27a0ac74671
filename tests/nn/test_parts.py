"""Residual placements, norms, feed-forward layers, stochastic depth, embeddings, poolings, stems."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tameformer.nn.drop_path import DropPath, depth_rates, drop_path
from tameformer.nn.embedding import OutputHead, TokenEmbedding, padded_size
from tameformer.nn.feed_forward import FeedForward, GatedFeedForward
from tameformer.nn.norms import layer_norm, rms_norm
from tameformer.nn.pooling import AttentionPooling, ClassTokenPooling, MaxPooling, MeanPooling, SoftmaxPooling
from tameformer.nn.residual import NoNorm, PeriNorm, PostNorm, PreNorm, branch_drop
from tameformer.nn.stems import ConvolutionStem, PatchStem, grid_size
from tameformer.nn.stems.convolution import prime_factors


class Scaled(nn.Module):
    """A branch that needs a keyword."""

    def forward(self, x, *, factor):
        return (x + 1) * factor


def normalized(x):
    return F.layer_norm(x, x.shape[-1:])


@pytest.mark.parametrize(
    ("placement", "formula", "needs_final_norm"),
    [
        (PreNorm, lambda x, f: x + f(normalized(x)), True),
        (PostNorm, lambda x, f: normalized(x + f(x)), False),
        (PeriNorm, lambda x, f: x + normalized(f(normalized(x))), True),
        (NoNorm, lambda x, f: x + f(x), False),
    ],
)
def test_placements(placement, formula, needs_final_norm):
    x = torch.randn(2, 3, 8)
    part = placement(8, Scaled(), norm=layer_norm, drop=nn.Identity())
    torch.testing.assert_close(part(x, factor=3.0), formula(x, lambda y: (y + 1) * 3.0))
    assert part.needs_final_norm is needs_final_norm
    dropped = placement(8, Scaled(), norm=layer_norm, drop=nn.Dropout(1.0))
    torch.testing.assert_close(dropped(x, factor=3.0), formula(x, torch.zeros_like) if placement is not PeriNorm else x)


def test_norms():
    x = 5 + 3 * torch.randn(2, 3, 64)
    torch.testing.assert_close(layer_norm(64)(x), (x - x.mean(-1, True)) / x.std(-1, keepdim=True, correction=0))
    torch.testing.assert_close(rms_norm(64)(x), x / x.square().mean(-1, keepdim=True).sqrt())
    assert layer_norm(64, bias=False).bias is None
    assert [name for name, _ in rms_norm(64).named_parameters()] == ["weight"]


def test_feed_forward_formulas():
    x = torch.randn(2, 3, 8)
    plain, gated = FeedForward(8, 12, activation=F.relu), GatedFeedForward(8, 12, bias=False)
    torch.testing.assert_close(plain(x), plain.down(plain.up(x).clamp(min=0)))
    torch.testing.assert_close(gated(x), gated.down(gated.gate(x) * gated.gate(x).sigmoid() * gated.up(x)))
    assert gated.gate.bias is None
    dropped = FeedForward(8, 12, dropout=1.0)
    torch.testing.assert_close(dropped(x), dropped.down.bias.expand(2, 3, 8))


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = torch.ones(4000, 2, 3)
    dropped = drop_path(x, 0.25, generator=torch.Generator().manual_seed(0))
    assert torch.isin(dropped, torch.tensor([0.0, 1 / 0.75])).all()
    assert (dropped == dropped[:, :1, :1]).all()
    assert float(dropped.mean()) == pytest.approx(1, abs=0.03)
    assert DropPath(0.5).eval()(x) is x
    assert DropPath(0.0)(x) is x
    with pytest.raises(ValueError, match="expected 0 <= rate < 1, got 1"):
        DropPath(1.0)


def test_depth_rates_and_what_has_rate_zero():
    assert depth_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert depth_rates(0.3, 1) == [0]
    assert isinstance(branch_drop(0.0, 0.0), nn.Identity)
    assert isinstance(branch_drop(0.1, 0.0), nn.Dropout)
    assert isinstance(branch_drop(0.0, 0.1), DropPath)
    assert [type(part) for part in branch_drop(0.1, 0.1)] == [nn.Dropout, DropPath]


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65])
def test_vocabulary_is_padded_in_the_weights_only(vocab_size):
    assert padded_size(vocab_size) == (64 if vocab_size <= 64 else 128)
    embedding, head, x = TokenEmbedding(vocab_size, 8, scale=3.0), OutputHead(8, vocab_size), torch.randn(2, 3, 8)
    assert embedding.weight.shape == head.weight.shape == (padded_size(vocab_size), 8)
    assert embedding.logits(x).shape == head(x).shape == (2, 3, vocab_size)
    torch.testing.assert_close(embedding.logits(x), x @ embedding.weight[:vocab_size].T)  # without the scale
    tokens = torch.randint(0, vocab_size, (2, 3))
    torch.testing.assert_close(embedding(tokens), 3 * embedding.weight[tokens])
    (embedding.logits(x).logsumexp(-1).sum() + head(x).logsumexp(-1).sum()).backward()
    assert not embedding.weight.grad[vocab_size:].any()
    assert not head.weight.grad[vocab_size:].any()


def test_both_ways_to_cut_the_vocabulary_agree(monkeypatch):
    x = torch.randn(2, 3, 8)
    head = OutputHead(8, 50)
    expected = head(x)
    meta = OutputHead(8, 50).to("meta")(x.to("meta"))  # any device that is not a CPU
    assert meta.shape == expected.shape
    torch.testing.assert_close(F.linear(x, head.weight)[..., :50], expected)


POOLINGS = [ClassTokenPooling, MeanPooling, MaxPooling, AttentionPooling, SoftmaxPooling]


@pytest.mark.parametrize("kind", POOLINGS[1:])
def test_poolings_ignore_padding_and_the_order_of_tokens(kind):
    torch.manual_seed(0)
    pooling, head, x = kind(8).double(), nn.Linear(8, 5).double(), torch.randn(3, 4, 8, dtype=torch.float64)
    for parameter in pooling.parameters():
        nn.init.normal_(parameter)
    expected = pooling(x, head)
    assert expected.shape == (3, 5)
    assert pooling.extend(x) is x
    real = F.pad(torch.ones(3, 4, dtype=torch.bool), (0, 2))
    torch.testing.assert_close(pooling(F.pad(x, (0, 0, 0, 2), value=9.0), head, real), expected)
    torch.testing.assert_close(pooling(x[:, [2, 0, 3, 1]], head), expected)


def test_pooling_formulas():
    torch.manual_seed(0)
    head, x = nn.Linear(8, 5), torch.randn(3, 4, 8)
    torch.testing.assert_close(MeanPooling(8)(x, head), head(x.sum(1) / 4))
    torch.testing.assert_close(MaxPooling(8)(x, head), head(x.max(1).values))
    torch.testing.assert_close(SoftmaxPooling(8)(x, head), head(x).softmax(-1).mean(1).log())
    attention = AttentionPooling(8)
    torch.testing.assert_close(attention(x, head), MeanPooling(8)(x, head))  # as it starts
    nn.init.normal_(attention.score)
    weights = (x * attention.score).sum(-1).softmax(-1)
    torch.testing.assert_close(attention(x, head), head((weights[:, :, None] * x).sum(1)))


def test_class_token_stands_in_front():
    pooling, x = ClassTokenPooling(8), torch.randn(3, 4, 8)
    nn.init.normal_(pooling.token)
    longer = pooling.extend(x)
    assert longer.shape == (3, 4 + pooling.extra_tokens, 8)
    assert longer[:, 1:].equal(x)
    torch.testing.assert_close(pooling(longer, nn.Identity()), pooling.token.expand(3, 8))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_patch_stem_is_a_strided_convolution(size):
    stem, images = PatchStem(3, size, 8), torch.randn(2, 3, 8, 12)
    weight = stem.project.weight.view(8, 3, size, size)
    expected = F.conv2d(images, weight, stem.project.bias, stride=size).flatten(2).transpose(1, 2)
    torch.testing.assert_close(stem(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        stem(images.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 12])
def test_convolution_stem_gives_one_token_a_patch_and_keeps_examples_apart(size):
    stem, images = ConvolutionStem(3, size, 16), torch.randn(2, 3, 2 * size, 3 * size)
    tokens = stem(images)
    assert tokens.shape == (2, 6, 16)
    torch.testing.assert_close(stem(images[:1]), tokens[:1], rtol=1e-4, atol=1e-5)


def test_prime_factors_and_grid():
    assert [prime_factors(number) for number in (1, 2, 7, 8, 12)] == [[1], [2], [7], [2, 2, 2], [2, 2, 3]]
    assert grid_size(28, 7) == (4, 4)
    with pytest.raises(ValueError, match=r"patch_size=5 and images of 28 x 28; choose one of \[1, 2, 4, 7, 14, 28\]"):
        grid_size(28, 5)
