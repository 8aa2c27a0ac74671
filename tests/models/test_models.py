"""What every model promises, over all of its parts."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tameformer.models import (
    DecoderConfig,
    EncoderConfig,
    EncoderDecoderConfig,
    VisionConfig,
    decoder,
    encoder,
    encoder_decoder,
    vision_classifier,
)
from tameformer.models.initialize import gpt2_init
from tameformer.models.stack import StackConfig
from tameformer.nn.attention import MultiHeadAttention, set_compute_dtype
from tameformer.nn.masks import causal_mask, document_mask, padding_mask

SMALL = {"dim": 16, "num_heads": 4}
VOCAB = 70


def build(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    if kind == "decoder":
        return decoder(DecoderConfig(num_layers=2, max_length=16, **SMALL, **settings), vocab_size=VOCAB)
    if kind == "encoder":
        return encoder(EncoderConfig(num_layers=2, max_length=16, **SMALL, **settings), vocab_size=VOCAB)
    if kind == "encoder_decoder":
        config = EncoderDecoderConfig(num_encoder_layers=2, num_decoder_layers=2, max_length=16, **SMALL, **settings)
        return encoder_decoder(config, vocab_size=VOCAB, padding_id=0)
    config = VisionConfig(num_layers=2, patch_size=4, **SMALL, **settings)
    return vision_classifier(config, num_classes=5, image_size=(8, 12), channels=3)


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (3, 9), generator=generator)
    images = torch.randn(3, 3, 8, 12, generator=generator, dtype=dtype)
    return {"encoder_decoder": (tokens, tokens[:, :7]), "vision": (images,)}.get(kind, (tokens,))


KINDS = ["decoder", "encoder", "encoder_decoder", "vision"]
STACKS = [
    {"residual": residual, "norm": norm, "activation": activation, "positions": positions, "bias": bias}
    for (residual, norm), activation, (positions, bias) in itertools.product(
        [("pre", "layer_norm"), ("post", "rms_norm"), ("peri", "rms_norm"), ("none", "layer_norm")],
        ["relu", "gelu", "swiglu"],
        [("sinusoidal", True), ("learned", False), ("rotary", False), ("none", True)],
    )
]
VISION = [
    {"pooling": pooling, "stem": stem}
    for pooling in ("class_token", "mean", "max", "attention", "softmax")
    for stem in ("patch", "convolution")
]
CASES = [("decoder", settings) for settings in STACKS]
CASES += [("encoder_decoder", settings) for settings in STACKS[::5]]  # 5 shares no factor with the counts: all parts
CASES += [("vision", settings) for settings in VISION + STACKS[:4]] + [("encoder", settings) for settings in STACKS[:4]]


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_gradients_reach_every_parameter(kind, settings):
    model = build(kind, **settings)
    out = model(*inputs(kind))
    assert out.isfinite().all()
    (out * torch.randn(out.shape)).sum().backward()
    unreached = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    # Softmax is blind to what a key bias adds to all logits of a query alike, unless rotary turns it.
    assert [name for name in unreached if not name.endswith("key.bias")] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_every_output_uses_each_token(kind, positions):
    """Guards against a part that is built and never called."""
    model = build(kind, positions=positions)
    names = {name for name, module in model.named_modules() if not list(module.children())}
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(*inputs(kind))
    assert names - called == set()


@pytest.mark.parametrize("kind", KINDS)
def test_built_twice_from_one_seed_is_the_same(kind):
    first, second = build(kind), build(kind)
    for (name, one), (_, other) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert one.equal(other), name
    assert first(*inputs(kind)).equal(second(*inputs(kind)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["decoder", "encoder_decoder"])
def test_state_dict_goes_through_safetensors(kind, tied, tmp_path):
    model = build(kind, tie_embeddings=tied, positions="rotary")
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    other = build(kind, tie_embeddings=tied, positions="rotary")
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert other(*inputs(kind)).equal(model(*inputs(kind)))


@pytest.mark.parametrize(("kind", "tables"), [("decoder", 1), ("encoder_decoder", 1)])
def test_tied_weights_are_one_parameter(kind, tables):
    model = build(kind)
    assert sum(parameter.shape[0] == 128 for parameter in model.parameters()) == tables
    model(*inputs(kind)).sum().backward()
    assert model.embedding.weight.grad[:VOCAB].any(dim=1).all()  # the output side reaches all rows
    clone = copy.deepcopy(model)
    with torch.no_grad():
        clone.embedding.weight.zero_()
    assert not clone(*inputs(kind)).any()
    assert model(*inputs(kind)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(kind, positions, dtype):
    model = build(kind, positions=positions).to(dtype)
    assert model(*inputs(kind, dtype)).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "none"])
def test_device_is_kept(kind, positions):
    model = build(kind, positions=positions).to("meta")
    out = model(*(tensor.to("meta") for tensor in inputs(kind)))
    assert out.device.type == "meta"


def test_drop_rates_act_in_training_only():
    for name in ("dropout", "attention_dropout", "drop_path"):
        model = build("decoder", **{name: 0.5})
        tokens = inputs("decoder")[0]
        assert not model(tokens).equal(model(tokens)), name
        model.eval()
        assert model(tokens).equal(build("decoder")(tokens)), name


def test_padding_of_the_source_changes_nothing():
    model = build("encoder_decoder", positions="sinusoidal").double()
    source, target_in = inputs("encoder_decoder")
    padded = F.pad(source, (0, 4))
    torch.testing.assert_close(model(padded, target_in), model(source, target_in), rtol=1e-12, atol=1e-12)
    real = F.pad(torch.ones_like(source, dtype=torch.bool), (0, 4))
    nonsense = padded.masked_fill(~real, 33)
    torch.testing.assert_close(
        model(nonsense, target_in, source_mask=real), model(source, target_in), rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(model(nonsense, target_in), model(source, target_in))


def test_padding_of_the_target_changes_nothing_before_it():
    model = build("encoder_decoder").double()
    source, target_in = inputs("encoder_decoder")
    padded = model(source, F.pad(target_in, (0, 4)))
    torch.testing.assert_close(padded[:, :7], model(source, target_in), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "none"])
def test_padding_of_an_encoder_changes_nothing(positions):
    model = build("encoder", positions=positions).double()
    tokens = inputs("encoder")[0]
    real = F.pad(torch.ones_like(tokens, dtype=torch.bool), (0, 4))
    padded = model(F.pad(tokens, (0, 4), value=5), real=real)
    torch.testing.assert_close(padded[:, :9], model(tokens), rtol=1e-12, atol=1e-12)


def test_causal_and_padding_mask_together_in_a_decoder():
    model = build("decoder", positions="none").double()
    tokens = inputs("decoder")[0]
    real = F.pad(torch.ones_like(tokens, dtype=torch.bool), (4, 0))  # padded on the left
    padded = model(F.pad(tokens, (4, 0)), mask=causal_mask(13, 13) & padding_mask(real))
    torch.testing.assert_close(padded[:, 4:], model(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["sinusoidal", "learned", "rotary", "none"])
def test_packed_documents_are_as_if_each_were_alone(positions):
    model = build("decoder", positions=positions).double()
    lengths = [4, 1, 6]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    tokens = torch.randint(0, VOCAB, (1, 11))
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(tokens, mask=document_mask(documents), positions=places)
    alone = [model(part) for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-12, atol=1e-12)


def test_later_tokens_change_nothing_before_them():
    model = build("decoder", positions="rotary").double()
    tokens = inputs("decoder")[0]
    changed = tokens.clone()
    changed[:, 6:] = 3
    torch.testing.assert_close(model(tokens)[:, :6], model(changed)[:, :6], rtol=0, atol=0)


def test_no_mask_is_built_for_causal_training():
    model = build("decoder")
    seen = []
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.attend.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model(*inputs("decoder"))
    assert seen == [{"mask": None, "is_causal": True}] * 2


def test_label_smoothing_over_a_padded_vocabulary_is_finite():
    model = build("decoder")
    tokens = inputs("decoder")[0]
    logits = model(tokens)
    assert logits.shape == (3, 9, VOCAB)
    assert logits.is_contiguous()
    assert F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1).isfinite()


def test_attention_dtype_under_autocast():
    model = build("decoder", positions="rotary")
    seen = []
    assert set_compute_dtype(model, torch.float32) == 2
    original = F.scaled_dot_product_attention

    def recorded(query, *args, **kwargs):
        mixed = original(query, *args, **kwargs)
        seen.append((query.dtype, mixed.dtype))  # autocast, left on, would change the result's
        return mixed

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "scaled_dot_product_attention", recorded)
        out = model(*inputs("decoder"))
    assert seen == [(torch.float32, torch.float32)] * 2
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(*inputs("decoder")), rtol=0.05, atol=0.02)


def test_gpt2_init_scales_branch_outputs_by_depth():
    torch.manual_seed(0)
    model = decoder(DecoderConfig(dim=128, num_layers=8), vocab_size=1000)
    layer = model.stack.layers[3]
    assert float(model.embedding.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(layer.feed_forward.branch.up.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert float(layer.feed_forward.branch.down.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.02)
    assert float(layer.attention.branch.out.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.02)
    assert not layer.attention.branch.query.bias.any()


def test_xavier_init():
    torch.manual_seed(0)
    config = EncoderDecoderConfig(dim=256, num_encoder_layers=1, num_decoder_layers=1)
    model = encoder_decoder(config, vocab_size=1000, padding_id=0)
    up = model.decoder.layers[0].feed_forward.branch.up
    assert float(up.weight.detach().abs().max()) == pytest.approx((6 / (256 + 1024)) ** 0.5, rel=1e-3)
    assert not up.bias.any()
    assert float(model.embedding.weight.detach().std()) == pytest.approx(1 / 16, rel=0.02)
    assert float(model.target_positions.table.detach().std()) == pytest.approx(1 / 16, rel=0.02)


def test_vit_init_leaves_the_stem():
    torch.manual_seed(0)
    model = vision_classifier(VisionConfig(dim=128, num_layers=1), num_classes=10, image_size=8, channels=3)
    query = model.stack.layers[0].attention.branch.query.weight.detach()
    assert float(query.abs().max()) == pytest.approx((6 / (128 + 128)) ** 0.5, rel=1e-3)
    assert float(model.stem.project.weight.detach().std()) == pytest.approx(1 / (3 * 3 * 16) ** 0.5, rel=0.05)


def test_the_initialization_can_be_passed():
    def ones(model: nn.Module) -> None:
        gpt2_init(model)
        nn.init.ones_(model.embedding.weight)

    model = decoder(DecoderConfig(**SMALL), vocab_size=5, initialize=ones)
    assert (model.embedding.weight == 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dim": 10, "num_heads": 4}, r"num_heads=4 and dim=10; choose one of \[1, 2, 5, 10\]"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"num_kv_heads=3 and num_heads=4; choose one of \[1, 2, 4\]"),
        ({"dim": 12, "num_heads": 4, "positions": "rotary"}, r"even dim / num_heads .* got 12 / 4 = 3"),
        ({"dim": 9, "num_heads": 3, "positions": "sinusoidal"}, "expected an even dim .* got 9"),
        ({"dropout": 1.0}, "expected 0 <= dropout < 1, got 1.0"),
        ({"drop_path": -0.1}, "expected 0 <= drop_path < 1, got -0.1"),
        ({"hidden_dim": 0}, "expected hidden_dim of at least 1, got 0"),
        ({"dim": 0}, "expected dim of at least 1, got 0"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        StackConfig(**settings)


def test_hidden_dim():
    assert StackConfig(dim=128).feed_forward_dim == 512
    assert StackConfig(dim=128, activation="swiglu").feed_forward_dim == 384
    assert StackConfig(dim=768, activation="swiglu").feed_forward_dim == 2048
    assert StackConfig(dim=128, hidden_dim=100).feed_forward_dim == 100


def test_wrong_inputs():
    with pytest.raises(ValueError, match="expected at most 16 positions, got 17"):
        build("decoder")(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="expected images of 8 x 12, got 8 x 8"):
        build("vision")(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"patch_size=3 and images of 8 x 8; choose one of \[1, 2, 4, 8\]"):
        vision_classifier(VisionConfig(patch_size=3), num_classes=2, image_size=8, channels=1)
    with pytest.raises(ValueError, match="0 <= padding_id < vocab_size = 5, got 5"):
        encoder_decoder(EncoderDecoderConfig(**SMALL), vocab_size=5, padding_id=5)
    with pytest.raises(ValueError, match="vocab_size of at least 1, got 0"):
        decoder(DecoderConfig(**SMALL), vocab_size=0)


@pytest.mark.parametrize("kind", ["decoder", "vision"])
def test_a_few_steps_lower_the_loss(kind):
    model = build(kind)
    batch = inputs(kind)
    targets = batch[0] if kind == "decoder" else torch.tensor([0, 3, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(model(*batch).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
