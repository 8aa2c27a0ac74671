"""Every score and every kind of positions in whole models: trained, cached, saved, probed and stabilized."""

import pytest
import torch
from torch import nn

import tameformer as tame
from tameformer.models import Architecture, DecoderConfig, EncoderConfig, EncoderDecoderConfig, decoder
from tameformer.models.stack import StackConfig

SMALL = {"dim": 16, "num_heads": 4, "max_length": 16}
POSITIONS = ["binary", "relative", "disentangled", "alibi", "t5"]
SCORES = ["dot", "general", "additive", "concat", "gaussian"]
PARTS = [{"positions": name} for name in POSITIONS] + [{"score": name} for name in SCORES]
PARTS += [{"positions": "relative", "score": "additive"}, {"positions": "t5", "num_kv_heads": 2}]

PARTS += [{"attention": "windowed", "radius": 3}, {"attention": "windowed", "radius": 2, "positions": "rotary"}]
CHEAPER = [{"attention": "linear", "num_kv_heads": 2}, {"attention": "collaborative"}]


def built(**parts) -> nn.Module:
    torch.manual_seed(0)
    return decoder(DecoderConfig(num_layers=2, **SMALL, **parts), vocab_size=30)


@pytest.mark.parametrize("parts", PARTS + CHEAPER, ids=str)
def test_a_decoder_learns_generates_and_is_rebuilt_from_plain_values(parts):
    model, tokens = built(**parts), torch.randint(30, (2, 9))
    model(tokens).square().sum().backward()
    hidden = ("key.bias",)  # adds the same to all logits of a query
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in unreached if not name.endswith(hidden)] == []
    model.eval()
    cache = model.new_cache()
    pieces = [model(piece, cache=cache) for piece in tokens.split([4, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-4, atol=1e-5)
    described = Architecture("decoder", DecoderConfig(num_layers=2, **SMALL, **parts), {"vocab_size": 30})
    again = Architecture.from_plain(described.to_plain()).build().eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert again(tokens).equal(model(tokens))


@pytest.mark.parametrize("parts", PARTS + CHEAPER, ids=str)
def test_low_precision_is_kept_and_close(parts):
    model, tokens = built(**parts).eval(), torch.randint(30, (2, 9))
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens).float(), expected, rtol=0.05, atol=0.02)
    model.to(torch.bfloat16)
    assert model(tokens).dtype == torch.bfloat16
    torch.testing.assert_close(model(tokens).float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_probes_see_every_layer_and_a_stabilizer_can_be_folded_in(parts):
    model, tokens = built(**parts).eval(), torch.randint(30, (2, 9))
    report = tame.diagnose(model, tokens, loss=lambda model, batch: model(batch).logsumexp(-1).mean())
    known = "no optimizer", "not one matrix"  # a table for each head is named as what has no spectral norm
    assert [line for line in report.unseen if not any(words in line for words in known)] == []
    for quantity in ("attention_entropy", "head_output"):
        assert len([key for key in report.values if key.startswith(f"diag/{quantity}/stack.layers.")]) == 2 * 4
    before = model(tokens)
    for method in ("sigma_reparam", "layer_scale", "qk_norm"):
        with tame.stabilize(model, method) as handle:
            assert len(handle.names) >= 2
            changed = model(tokens)
            assert changed.isfinite().all()
        assert model(tokens).equal(before), method


@pytest.mark.parametrize("kind", ["encoder", "encoder_decoder"])
def test_cross_attention_knows_no_distance(kind):
    from tameformer.models import encoder, encoder_decoder

    tokens = torch.randint(1, 30, (2, 9))
    if kind == "encoder":
        assert (
            encoder(EncoderConfig(num_layers=1, positions="relative", **SMALL), vocab_size=30)(tokens).isfinite().all()
        )
        return
    config = EncoderDecoderConfig(num_encoder_layers=1, num_decoder_layers=1, positions="disentangled", **SMALL)
    model = encoder_decoder(config, vocab_size=30, padding_id=0)
    layer = model.decoder.layers[0]
    assert layer.cross_attention.branch.relative is None
    assert layer.attention.branch.relative is not None
    assert model(tokens, tokens[:, :5]).isfinite().all()


def test_disentangled_positions_score_by_scaled_dot_products():
    with pytest.raises(ValueError, match="expected the score scaled_dot beside disentangled positions, got additive"):
        StackConfig(positions="disentangled", score="additive")


@pytest.mark.parametrize("parts", CHEAPER, ids=str)
def test_what_cannot_be_seen_or_stabilized_is_said(parts):
    model, tokens = built(**parts).eval(), torch.randint(30, (2, 9))
    report = tame.diagnose(model, tokens, loss=lambda model, batch: model(batch).logsumexp(-1).mean())
    named = any("stack.layers.0.attention" in line for line in report.unseen)
    seen = any(key.startswith("diag/attention_entropy/stack.layers.0") for key in report.values)
    assert (named, seen) == ((True, False) if parts["attention"] == "linear" else (False, True))
    before = model(tokens)
    with tame.sigma_reparam(model):
        assert model(tokens).isfinite().all()
    assert model(tokens).equal(before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "windowed"}, "radius of at least 1 for windowed attention only, got None for windowed"),
        ({"radius": 4}, "got 4 for full"),
        ({"attention": "linear", "positions": "alibi"}, "positions sinusoidal, .* for linear attention, got .* alibi"),
        ({"attention": "linear", "attention_dropout": 0.1}, "which has no weights to drop, got 0.1"),
        (
            {"attention": "collaborative", "positions": "rotary"},
            "for collaborative attention, got scaled_dot and rotary",
        ),
        ({"attention": "collaborative", "num_kv_heads": 2}, "no num_kv_heads for collaborative heads, got 2"),
    ],
)
def test_attention_without_a_place_for_a_part_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StackConfig(**settings)
