import copy
import subprocess
import sys
import weakref

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, MarianConfig, MarianMTModel

from tameformer.errors import NonFiniteError, PatchError
from tameformer.models import EncoderConfig, EncoderDecoderConfig, encoder, encoder_decoder
from tameformer.models.initialize import xavier_init
from tameformer.optim import decay_groups
from tameformer.stabilizers.admin import admin, profile_free_scale
from tameformer.stabilizers.shortcut_profile import admin_scales, real_tokens

TOKENS = torch.arange(1, 15).view(2, 7)
REAL = torch.arange(7) < torch.tensor([[7], [4]])


def ours(layers=3, **config):
    torch.manual_seed(0)
    small = {"dim": 16, "num_heads": 2, "residual": "post", "positions": "sinusoidal", **config}
    return encoder(EncoderConfig(num_layers=layers, **small), vocab_size=20, initialize=xavier_init)


def pair(residual="post"):
    torch.manual_seed(0)
    config = EncoderDecoderConfig(dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=3, residual=residual)
    return encoder_decoder(config, vocab_size=20, padding_id=0)


def torch_stack(batch_first=True):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def torch_pair():
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 2, 2, 32, 0.0, batch_first=True)


def bert(**config):
    torch.manual_seed(0)
    config = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **config}
    return BertModel(BertConfig(**config, intermediate_size=32)).eval()


def marian(**config):
    torch.manual_seed(0)
    config = {"vocab_size": 20, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": 0, **config}
    config |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config |= {"decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": 1, "use_cache": False}
    return MarianMTModel(MarianConfig(**config)).eval()


STREAM, TARGET = torch.linspace(-3, 9, 224).sin().view(2, 7, 16), torch.linspace(-3, 8, 160).cos().view(2, 5, 16)
HF = {"input_ids": TOKENS, "attention_mask": REAL.long()}
FAMILIES = {
    "ours": (ours, {"tokens": TOKENS, "real": REAL}, lambda out: out[REAL]),
    "ours-rms": (lambda: ours(norm="rms_norm", activation="swiglu"), {"tokens": TOKENS}, lambda out: out),
    "pair": (pair, {"source": TOKENS, "target_in": TOKENS}, lambda out: out),
    "torch": (torch_stack, {"src": STREAM, "src_key_padding_mask": ~REAL}, lambda out: out[REAL]),
    "torch-pair": (torch_pair, {"src": STREAM, "tgt": TARGET}, lambda out: out),
    "bert": (bert, HF, lambda out: out.last_hidden_state),
    "marian": (marian, {**HF, "decoder_input_ids": TOKENS}, lambda out: out.logits),
}
FUSED = "ignore:The PyTorch API of nested tensors"


def by_hand(model, tokens, omegas=None):
    """The forward pass of `ours` with factors, in plain sight; without factors it profiles as the authors' code does."""
    x = model.positions(model.embedding(tokens), None)
    omega, used = 1.0, []
    for layer in model.stack.layers:
        for part in (layer.attention, layer.feed_forward):
            omega = omega if omegas is None else omegas[len(used)]
            used.append(omega)
            branch = part.branch(x)
            if omegas is None:
                shortcut = max((x * omega).detach().numpy().var(), 1.0 if len(used) == 1 else 0.0)
                after = numpy.sqrt(shortcut + branch.detach().numpy().var())
            x = part.norm(x * omega + branch)
            omega = after if omegas is None else None
    return x, [float(value) for value in used] if omegas is None else used


def test_the_profile_is_the_recursion_of_the_authors_code():
    model = ours(6)
    output, omegas = by_hand(model.eval(), TOKENS)
    handle = admin(model, [{"tokens": TOKENS}])
    assert handle.settings["scales"] == pytest.approx(omegas, rel=1e-5)
    assert omegas[0] == 1
    assert omegas == sorted(omegas)
    assert omegas[-1] > 1.5
    torch.testing.assert_close(model(TOKENS), output, rtol=1e-4, atol=1e-5)


@given(variances=st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_factors_from_variances_obey_the_recursion(variances):
    scales = admin_scales(variances)
    assert scales[0] == 1
    for before, after, variance in zip(scales, scales[1:], variances, strict=False):
        assert after**2 == pytest.approx(before**2 + variance)


def test_profile_free_factors():
    assert [round(profile_free_scale(n), 3) for n in (12, 36, 200)] == [2.017, 3.041, 6.075]
    assert [round(profile_free_scale(n, "constant"), 3) for n in (12, 36, 200)] == [3.464, 6.0, 14.142]
    assert admin(ours()).settings["scales"] == pytest.approx([1.0] + [profile_free_scale(6)] * 5)
    # Encoder and decoder count apart.
    scales = admin(pair(), growth="constant").settings["scales"]
    assert scales == pytest.approx([1, *[4**0.5] * 3, 1, *[9**0.5] * 8])


@pytest.mark.filterwarnings(FUSED)
@pytest.mark.parametrize("trainable", [True, False])
def test_any_factors_by_channel_or_not_are_on_the_shortcut(trainable):
    model, plain = ours().double(), ours().double()
    handle = admin(model, trainable=trainable, scales=[1.5, 0.5, 2.0, 1.0, 3.0, 1.2], train_first=True)
    omegas = [1.5, 0.5, 2.0, 1.0, 3.0, 1.2]
    if trainable:
        for parameter in handle.new_parameters:
            parameter.data.add_(torch.linspace(-0.4, 0.4, 16))
        omegas = [parameter.detach() for parameter in handle.new_parameters]
    torch.testing.assert_close(model(TOKENS), by_hand(plain, TOKENS, omegas)[0], rtol=1e-11, atol=1e-11)


def test_padding_batch_order_and_repetition_do_not_count():
    short, long = {"tokens": TOKENS[:1, :4]}, {"tokens": TOKENS, "real": REAL}
    noisy = {"tokens": torch.where(REAL, TOKENS, 19), "real": REAL}

    def scales(*batches):
        model = ours().train()
        handle = admin(model, batches)
        assert model.training
        return handle.settings["scales"]

    assert scales(long) == scales(noisy)
    assert scales(long) != scales({"tokens": TOKENS})
    assert scales(short, long) == pytest.approx(scales(long, short), rel=1e-12)
    assert scales(short, short) == pytest.approx(scales(short), rel=1e-6)
    model = ours()
    with admin(model, [long]) as handle:
        first = handle.settings["scales"]
    assert admin(model, [long]).settings["scales"] == first


def test_sides_have_their_own_factors_and_masks():
    batch = {"source": TOKENS, "target_in": TOKENS}
    model = pair()
    plain = admin(model, [batch]).settings["scales"]
    masked = admin(pair(), [batch], mask=lambda batch: {"decoder": REAL}).settings["scales"]
    assert (plain[0], plain[4]) == (1.0, 1.0)
    assert plain[:5] == masked[:5]
    assert all(a != b for a, b in zip(plain[5:], masked[5:], strict=True))
    masks = real_tokens({"attention_mask": REAL.long(), "tgt_key_padding_mask": ~REAL})
    assert all(torch.equal(masks[side], REAL) for side in ("encoder", "decoder"))


def test_sequence_first_streams_are_masked_alike():
    batch = {"src": STREAM, "src_key_padding_mask": ~REAL}
    first = admin(torch_stack(), [batch]).settings["scales"]
    second = admin(torch_stack(batch_first=False), [{**batch, "src": STREAM.transpose(0, 1)}]).settings["scales"]
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.filterwarnings(FUSED)
@pytest.mark.parametrize("kind", ["profiled", "trained", "fixed", "profile-free"])
@pytest.mark.parametrize("family", FAMILIES)
def test_baking_gives_a_plain_model_with_equal_outputs(family, kind):
    build, inputs, read = FAMILIES[family]
    model = build().eval()
    keys, objects, plain = list(model.state_dict()), [id(p) for p in model.parameters()], read(model(**inputs))
    batches = None if kind == "profile-free" else [inputs]
    handle = admin(model, batches, trainable=kind != "fixed")
    assert bool(handle.new_parameters) == (kind != "fixed")
    if kind == "trained":
        for parameter in handle.new_parameters:
            parameter.data.add_(torch.linspace(-0.3, 0.6, 16))
    expected = read(model(**inputs))
    assert not torch.equal(expected, plain)
    handle.bake()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == objects
    fresh = build().eval()
    fresh.load_state_dict(load(save({k: v.clone() for k, v in model.state_dict().items()})))
    for folded in (model, fresh):
        scale = expected.abs().max()
        assert (read(folded(**inputs)) - expected).abs().max() < 2e-6 * scale


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_folding_any_factors_is_exact_in_float64(seed):
    model = ours(activation="swiglu").double()
    handle = admin(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for parameter in handle.new_parameters:
        sign = torch.randn(16, generator=generator).sign()
        parameter.data.copy_(sign * (0.2 + torch.rand(16, generator=generator)))  # negative ones fold too
    expected = model(TOKENS)
    handle.bake()
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings(FUSED)
@pytest.mark.parametrize("family", FAMILIES)
def test_removal_is_exact_and_copies_and_checkpoints_work(family):
    build, inputs, read = FAMILIES[family]
    model = build().eval()
    before, plain = [(n, id(p)) for n, p in model.named_parameters()], read(model(**inputs))
    handle = admin(model, [inputs])
    for parameter in handle.new_parameters:
        parameter.data.mul_(1.5)
    patched, twin, other = read(model(**inputs)), copy.deepcopy(model), build().eval()
    admin(other, **handle.settings)
    other.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        if name.endswith("shortcut_scale"):
            parameter.data.zero_()
    with torch.no_grad():
        assert not torch.equal(read(model(**inputs)), patched)
    handle.remove()
    assert [(n, id(p)) for n, p in model.named_parameters()] == before
    assert torch.equal(read(model(**inputs)), plain)
    for module in model.modules():
        assert not {*module._forward_hooks, *module._forward_pre_hooks, *module._forward_hooks_always_called}
    assert torch.equal(read(twin(**inputs)), patched)
    assert torch.equal(read(other(**inputs)), patched)


def test_the_factors_reach_the_optimizer_once_and_undecayed():
    model = ours()
    handle = admin(model, [{"tokens": TOKENS}])
    undecayed = [
        p for group in decay_groups(model, weight_decay=0.1) if not group["weight_decay"] for p in group["params"]
    ]
    assert all(sum(p is new for p in undecayed) == 1 for new in handle.new_parameters)
    model(TOKENS).pow(3).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in handle.new_parameters)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients_and_keeps_nothing(use_reentrant):
    model, plain = ours(), ours()
    for one in (model, plain):
        admin(one, growth="constant")

    def stack(x):
        for layer in model.stack.layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x

    x = torch.randn(2, 7, 16, requires_grad=True)
    expected = plain.stack(x)
    expected.square().sum().backward()
    stack(x).square().sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    held = [hook.stream.value for m in model.modules() for hook in m._forward_pre_hooks.values()]
    assert len(held) == 10
    assert all(value is None for value in held)


def test_an_exception_in_a_layer_leaves_no_tensor_behind():
    model = ours(1)
    admin(model)
    down = model.stack.layers[0].feed_forward.branch.down
    seen = []

    def fail(module, args):
        seen.append(weakref.ref(args[0]))
        raise RuntimeError("boom")

    down.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="boom"):
        model(TOKENS)
    assert all(
        h.stream.value is None for m in model.modules() for h in m._forward_pre_hooks.values() if hasattr(h, "stream")
    )


def test_autocast_scales_in_the_dtype_of_the_sum():
    model = ours()
    admin(model, [{"tokens": TOKENS}])
    with torch.autocast("cpu", torch.bfloat16):
        low = model(TOKENS)
    torch.testing.assert_close(low.float(), model(TOKENS), rtol=0.05, atol=0.1)


def test_an_exception_midway_leaves_the_model_as_it_was():
    model = ours()
    before = [(n, id(p)) for n, p in model.named_parameters()]
    for batches, error, words in (
        ([{"tokens": TOKENS, "nothing": 1}], TypeError, "nothing"),
        ([], ValueError, "expected at least one batch to profile, got none"),
    ):
        with pytest.raises(error, match=words):
            admin(model.train(), batches)
        assert all(module.training for module in model.modules())
        assert [(n, id(p)) for n, p in model.named_parameters()] == before
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_refusals_to_apply():
    model = ours()
    with pytest.raises(PatchError, match=r"admin needs Post-norm layers, but stack.layers.0.attention is pre-norm"):
        admin(ours(residual="pre"))
    admin(model)
    with pytest.raises(PatchError, match=r"shortcut of .* is scaled already"):
        admin(model)
    with pytest.raises(ValueError, match="expected batches or scales, got both"):
        admin(ours(), [{"tokens": TOKENS}], scales=[1.0] * 6)
    with pytest.raises(ValueError, match=r"expected 6 factors above 0, one a branch, got \[1.0, -1.0\]"):
        admin(ours(), scales=[1.0, -1.0])
    model = ours()
    model.stack.layers[1] = model.stack.layers[0]
    with pytest.raises(PatchError, match=r"stack.layers.0 stands at several"):
        admin(model)
    with pytest.raises(PatchError, match="the batches never ran the branch decoder"):
        admin(pair(), [TOKENS], call=lambda model, batch: model.encode(batch))
    model = ours()
    model.stack.layers[1].attention.branch.value.weight.data[0, 0] = torch.nan
    with pytest.raises((NonFiniteError, PatchError)):
        admin(model, [{"tokens": TOKENS}])


def test_refusals_to_bake_leave_the_patch_on():
    def refused(model, words, **settings):
        handle = admin(model, **settings)
        for parameter in handle.new_parameters:
            parameter.data.add_(torch.linspace(0, 1, 16))
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(PatchError, match=words):
            handle.bake()
        assert handle.is_active
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        handle.remove()

    refused(ours(), "its factor was trained by channel, and the stream comes from embeddings", train_first=True)
    tied = ours()
    tied.stack.layers[1].feed_forward.branch.up.weight = tied.stack.layers[0].feed_forward.branch.up.weight
    refused(tied, "weights that would take it serve at other places too")
    refused(marian(encoder_layerdrop=0.1), "layers are skipped while training")
    refused(bert(output_hidden_states=True), "the model returns the stream between its layers")
    refused(ours(norm="layer_norm", bias=True), "factor was trained", train_first=True)


TWO = """
import sys, torch
import torch.distributed as dist
from tameformer.models import EncoderConfig, encoder
from tameformer.stabilizers.admin import admin
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
config = EncoderConfig(num_layers=2, dim=16, num_heads=2, residual="post")
model = encoder(config, vocab_size=20)
tokens = torch.arange(1, 15).view(2, 7)
mine = admin(model, [(tokens[rank:rank + 1],)] * (1 + rank)).settings["scales"]
dist.destroy_process_group()
alone = admin(encoder(config, vocab_size=20), None, scales=mine)
torch.manual_seed(0)
together = admin(encoder(config, vocab_size=20), [(tokens[:1],), (tokens[1:],), (tokens[1:],)]).settings["scales"]
print(mine == together or max(abs(a - b) for a, b in zip(mine, together)) < 1e-9)
"""


def test_several_processes_agree_with_one(tmp_path):
    command = [sys.executable, "-c", TWO]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["True", "True"]


COMPILED = """
import torch
from tameformer.models import EncoderConfig, encoder
from tameformer.stabilizers.admin import admin
model = encoder(EncoderConfig(num_layers=2, dim=16, num_heads=2, residual="post"), vocab_size=20)
handle = admin(model)
tokens = torch.arange(1, 15).view(2, 7)
compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(tokens), model(tokens))
handle.new_parameters[0].data.mul_(3)
torch.testing.assert_close(compiled(tokens), model(tokens))
compiled(tokens).pow(3).sum().backward()
assert all(p.grad is not None for p in handle.new_parameters)
"""


@pytest.mark.compile
def test_the_hooks_compile_to_one_graph():
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
