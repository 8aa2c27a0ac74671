import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from tameformer.errors import PatchError
from tameformer.models.decoder import DecoderConfig, decoder
from tameformer.patch import named
from tameformer.stabilizers.norm_removal import NoNorm, is_norm
from tameformer.stabilizers.sigma_reparam import (
    Rows,
    SigmaReparam,
    advance,
    effective_weight,
    is_matrix_layer,
    sigma_reparam,
    whole,
)
from tameformer.stabilizers.sigma_weight import FOLLOWED

TOKENS = torch.arange(2 * 6).view(2, 6) % 13


def torch_encoder(**settings):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **settings)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not settings)


def vectors(*shape):
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.get_default_dtype())
    return values.mul(12.9898).sin().view(shape)


def on_vectors(model):
    return model(vectors(2, 5, 16))


def torch_transformer():
    return nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertModel(
        BertConfig(
            vocab_size=13, max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes
        ),
        add_pooling_layer=False,
    )


def vit():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=2, n_head=2, **none))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 13}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    )


def marian():
    from transformers import MarianConfig, MarianMTModel

    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    return MarianMTModel(
        MarianConfig(
            vocab_size=13,
            d_model=16,
            max_position_embeddings=8,
            pad_token_id=12,
            decoder_start_token_id=0,
            **sides,
            **heads,
        )
    )


FAMILIES = {
    "ours": (
        lambda: decoder(DecoderConfig(num_layers=2, dim=16, num_heads=2, max_length=8, dropout=0.0), vocab_size=13),
        lambda model: model(TOKENS),
    ),
    "torch encoder": (torch_encoder, on_vectors),
    "torch encoder, Pre-norm": (partial(torch_encoder, norm_first=True), on_vectors),
    "torch transformer": (torch_transformer, lambda model: model(vectors(2, 3, 16), vectors(2, 4, 16))),
    "BERT": (bert, lambda model: model(TOKENS).last_hidden_state),
    "ViT": (vit, lambda model: model(vectors(2, 3, 8, 8)).last_hidden_state),
    "GPT-2": (gpt2, lambda model: model(TOKENS).logits),
    "Llama": (llama, lambda model: model(TOKENS).logits),
    "T5": (t5, lambda model: model(TOKENS, decoder_input_ids=TOKENS).logits),
    "Marian": (marian, lambda model: model(TOKENS, decoder_input_ids=TOKENS).logits),
}
family = pytest.mark.parametrize(("build", "run"), FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def mlp():
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def members(model):
    return [module for module in model.modules() if isinstance(module, SigmaReparam)]


def train(model, steps, run=lambda model: model(torch.linspace(-1, 1, 18).view(3, 6)), **settings):
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, **settings})
    for _ in range(steps):
        run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def spectral_norm(weight):
    return torch.linalg.matrix_norm(weight.detach().flatten(1), 2)


# The promises, over every family


@family
def test_outputs_unchanged_and_removed_exactly(build, run):
    model = build().eval()
    keys, kept = list(model.state_dict()), list(model.parameters())
    kinds = [type(module) for module in model.modules()]
    before = run(model)
    handle = sigma_reparam(model)
    assert torch.equal(run(model), before)
    handle.remove()
    assert list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), kept, strict=True))
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(run(model), before)


@pytest.fixture
def _in_float64():
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(kept)


@family
@pytest.mark.usefixtures("_in_float64")
def test_every_gamma_acts_in_every_mode(build, run):
    model = build()
    handle = sigma_reparam(model)
    assert {id(gamma) for gamma in handle.new_parameters} <= {id(parameter) for parameter in model.parameters()}
    plain = run(model.train()).detach()
    for gamma in handle.new_parameters:
        with torch.no_grad():
            gamma.mul_(3)
        changed = run(model.train()).detach()
        assert (changed - plain).abs().max() > 1e-9, "in training"
        torch.testing.assert_close(run(model.eval()).detach(), changed)
        with torch.no_grad():
            torch.testing.assert_close(run(model), changed)
            gamma.div_(3)


@family
def test_baked_is_an_ordinary_model(build, run, tmp_path):
    from safetensors.torch import load_model, save_model

    model = build().eval()
    keys, kept = list(model.state_dict()), list(model.parameters())
    handle = sigma_reparam(model)
    with torch.no_grad():
        for gamma in handle.new_parameters:
            gamma.mul_(1.2)
        before = run(model)
        handle.bake()
        torch.testing.assert_close(run(model), before, rtol=1e-6, atol=1e-6)
    assert list(model.state_dict()) == keys
    assert all(now is then for now, then in zip(model.parameters(), kept, strict=True))
    save_model(model, str(tmp_path / "baked.safetensors"))
    fresh = build().eval()
    load_model(fresh, str(tmp_path / "baked.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(run(fresh), before, rtol=1e-6, atol=1e-6)


@family
def test_a_trained_patched_model_loads_into_a_fresh_one_and_copies(build, run):
    more_later = partial(sigma_reparam, steps_at=lambda updates: 1 if updates < 2 else 4)
    model = build()
    more_later(model)
    train(model, 2, run)
    torch.manual_seed(1)
    fresh = build()
    more_later(fresh)
    fresh.load_state_dict(model.state_dict())
    copied = copy.deepcopy(model)
    for other in (fresh, copied):
        train(other, 1, run)
    train(model, 1, run)
    with torch.no_grad():
        expected = run(model)
        assert torch.equal(run(fresh), expected)
        assert torch.equal(run(copied), expected)
    assert {int(one.updates) for one in members(copied)} == {3}


def test_memory_of_dropped_models_is_not_held():
    model = mlp()
    sigma_reparam(model)
    one = weakref.ref(members(model)[0])
    del model
    gc.collect()
    assert one() is None


@family
def test_effective_weights_have_the_learned_spectral_norm(build, run):
    model = build()
    handle = sigma_reparam(model, gamma=1.0)
    train(model, 3, run, lr=1e-4)
    for one in members(model):
        effective = one.effective()
        for matrix, gamma in zip(one.parts.of(effective), one.gamma, strict=True):
            assert spectral_norm(matrix).item() == pytest.approx(abs(gamma.item()), rel=0.05)
    assert len(handle.new_parameters) == len(members(model))


# The algebra, in float64


@given(seed=st.integers(0, 10**6), out=st.integers(1, 7), in_=st.integers(1, 7), gamma=st.floats(-3, 3))
def test_algebra(seed, out, in_, gamma):
    generator = torch.Generator().manual_seed(seed)
    weight, grad = torch.randn(2, out, in_, generator=generator, dtype=torch.float64).unbind()
    layer = nn.Linear(in_, out, bias=False, dtype=torch.float64)
    layer.weight.data.copy_(weight)
    sigma_reparam(layer, gamma=gamma, where=is_matrix_layer)
    one = members(layer)[0]
    effective = layer.weight
    assert spectral_norm(effective).item() == pytest.approx(abs(gamma), abs=1e-12)
    effective.backward(grad)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    sigma, top = values[0], torch.outer(left[:, 0], right[0])
    product = (grad * weight).sum() / sigma
    torch.testing.assert_close(one.gamma.grad, product[None], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(one.weight.grad, gamma / sigma * (grad - product * top), rtol=1e-10, atol=1e-12)
    assert (one.weight.grad * weight).sum().abs() < 1e-10 * (1 + abs(gamma))
    with torch.no_grad():
        one.weight.mul_(5.0)
        torch.testing.assert_close(layer.eval().weight, effective, rtol=1e-12, atol=1e-13)


def test_own_gradient_agrees_with_autograd_and_numbers():
    torch.manual_seed(3)
    weight, left = (
        torch.randn(5, 4, dtype=torch.float64),
        nn.functional.normalize(torch.randn(5, dtype=torch.float64), dim=0),
    )
    gamma = torch.tensor(1.7, dtype=torch.float64)
    weight.requires_grad_(), gamma.requires_grad_()
    assert torch.autograd.gradcheck(effective_weight, (weight, gamma, left))
    assert torch.autograd.gradgradcheck(effective_weight, (weight, gamma, left))
    layer = nn.Linear(4, 6, dtype=torch.float64)
    sigma_reparam(layer, split=lambda *_: Rows((1, 2), groups=2))
    one = members(layer)[0]
    one.left.copy_(nn.functional.normalize(torch.randn(6, dtype=torch.float64), dim=0))  # any fixed vector
    assert torch.autograd.gradcheck(lambda weight, gamma: _at(one, weight, gamma), (one.weight, one.gamma))


def _at(one, weight, gamma):
    return torch.func.functional_call(one, {"gamma": gamma}, (weight,))


@pytest.mark.parametrize("shape", [(64, 48), (256, 256), (96, 300)])
def test_gradients_in_fp32_against_float64(shape):
    layer = nn.Linear(shape[1], shape[0])
    grad = torch.randn(shape)
    sigma_reparam(layer)
    one = members(layer)[0]
    layer.weight.backward(grad)
    weight, gamma = one.weight.detach().double().requires_grad_(), one.gamma.detach().double().requires_grad_()
    effective_weight(weight, gamma[0], nn.functional.normalize(one.left.double(), dim=0)).backward(grad.double())
    for mine, exact, bound in ((one.weight.grad, weight.grad, 1e-6), (one.gamma.grad, gamma.grad, 5e-5)):
        assert (mine.double() - exact).norm() <= bound * exact.norm()


def test_second_derivatives_are_refused_or_right():
    layer = nn.Linear(3, 3)
    sigma_reparam(layer)
    (grad,) = torch.autograd.grad(layer.weight.square().sum(), [members(layer)[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Layouts


def test_layouts_share_one_function():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(4)
    linear, transposed, conv = nn.Linear(6, 12), Conv1D(12, 6), nn.Conv2d(3, 12, (1, 2))
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.t())
        conv.weight.copy_(linear.weight.view(12, 3, 1, 2))
    grad = torch.randn(12, 6)
    for split in (whole, lambda *_: Rows((4, 4, 4)), lambda *_: Rows((2, 1, 1), groups=3)):
        handles, found = [], []
        for layer, same in ((linear, grad), (transposed, grad.t()), (conv, grad.view(12, 3, 1, 2))):
            handles.append(sigma_reparam(layer, split=split, gamma=1.3))
            one = members(layer)[0]
            one.weight.grad = None
            layer.weight.backward(same)
            found.append((layer.weight, one.weight.grad, one.gamma.grad))
        for weight, weight_grad, gamma_grad in (
            (found[1][0].t(), found[1][1].t(), found[1][2]),
            (found[2][0].flatten(1), found[2][1].flatten(1), found[2][2]),
        ):
            torch.testing.assert_close(weight, found[0][0])
            torch.testing.assert_close(weight_grad, found[0][1])
            torch.testing.assert_close(gamma_grad, found[0][2])
        for handle in handles:
            handle.remove()


def test_compiled_and_eager_formulas_agree():
    for split in (whole, lambda *_: Rows((4, 8)), lambda *_: Rows((2, 1, 1), groups=3)):
        layer = nn.Linear(6, 12)
        sigma_reparam(layer, split=split, gamma=0.7)
        one = members(layer)[0]
        gradient, plain = torch.func.grad_and_value(lambda weight, one=one: one(weight).pow(3).sum())(
            one.weight.detach()
        )
        value = layer.weight.pow(3).sum()
        value.backward()
        torch.testing.assert_close(plain, value.detach())
        torch.testing.assert_close(gradient, one.weight.grad)
        assert one._now.images is None or not torch._C._functorch.is_functorch_wrapped_tensor(one._now.images[0])


def test_fused_projections_are_taken_apart():
    assert [len(gamma) for gamma in sigma_reparam(torch_encoder()).new_parameters] == [3, 1, 1, 1] * 2
    model = gpt2()
    sizes = {name: len(gamma) for name, gamma in model.named_parameters() if name.endswith("gamma")}
    assert sizes == {}
    sigma_reparam(model)
    sizes = {
        name.split(".parametrizations")[0]: len(p) for name, p in model.named_parameters() if name.endswith("gamma")
    }
    assert sizes["transformer.h.0.attn.c_attn"] == 3
    assert sizes["transformer.h.0.attn.c_proj"] == 1
    joint = nn.MultiheadAttention(8, 2, kdim=6, vdim=4)
    assert len(sigma_reparam(joint).new_parameters) == 4


def test_groups_of_heads_are_taken_apart():
    from transformers import FalconConfig, FalconModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 13, "num_attention_heads": 4, "num_kv_heads": 2}
    model = FalconModel(FalconConfig(new_decoder_architecture=True, **sizes))
    attention = model.h[0].self_attention
    weight = attention.query_key_value.weight.detach()
    by_head = weight.view(2, 4, 4, 16)  # groups, two queries and a key and a value, head_dim, dim
    sigma_reparam(model, where=named("*.query_key_value"))
    query, key, value = members(model)[0].parts.of(weight)
    assert torch.equal(query, by_head[:, :2].reshape(-1, 16))
    assert torch.equal(key, by_head[:, 2].reshape(-1, 16))
    assert torch.equal(value, by_head[:, 3].reshape(-1, 16))
    before = model.eval()(TOKENS).last_hidden_state
    with torch.no_grad():
        members(model)[0].gamma[0] *= 0  # no queries: attention is uniform, and still there
    assert not torch.allclose(model(TOKENS).last_hidden_state, before)


def test_ties_stay():
    model = gpt2()
    handle = sigma_reparam(model, where=named("lm_head"))
    assert set(handle.names) == {"transformer.wte.weight", "lm_head.weight"}
    assert len(handle.new_parameters) == 1
    with torch.no_grad():
        handle.new_parameters[0].mul_(2)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    train(model, 2, lambda model: model(TOKENS).logits)
    effective = model.lm_head.weight.detach().clone()
    handle.bake()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, effective)


def test_sparse_gradients_of_a_tied_embedding():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4, sparse=True), "out": nn.Linear(4, 5)})
    model["out"].weight = model["embedding"].weight
    sigma_reparam(model)
    model["out"](model["embedding"](torch.tensor([1, 2]))).sum().backward()
    assert members(model)[0].weight.grad.layout == torch.strided


# Once per optimizer step


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_one_power_step_an_update_whatever_the_optimizer(settings):
    model = mlp()
    sigma_reparam(model, steps_at=lambda updates: 1)
    one = members(model)[0]
    left, image = one.left.clone(), one.weight.detach().t() @ one.left
    train(model, 1, **settings)
    expected = one.weight.detach() @ image
    torch.testing.assert_close(one.left, expected / expected.norm())
    assert not torch.equal(one.left, left)
    assert int(one.updates) == 1


@pytest.mark.parametrize("how", ["plain", "accumulation", "twice", "reentrant", "non-reentrant", "evaluated"])
def test_the_vectors_are_the_same_however_often_forward_runs(how):
    data = torch.linspace(-1, 1, 24).view(4, 6)

    def found(how):
        torch.manual_seed(5)
        model = mlp().double()
        sigma_reparam(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        for _ in range(4):
            x = data.double().requires_grad_()
            match how:
                case "accumulation":
                    for part in x.chunk(2):
                        (model(part).square().sum() / 16).backward()
                case "reentrant" | "non-reentrant":
                    checkpoint(model, x, use_reentrant=how == "reentrant").square().mean().backward()
                case _:
                    if how == "twice":
                        model(x)
                    if how == "evaluated":
                        model.eval()(x)
                        model.train()
                    model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [one.left for one in members(model)] + list(model.parameters())

    for mine, plain in zip(found(how), found("plain"), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-13)


def test_two_forwards_before_one_backward():
    model = mlp()
    sigma_reparam(model)
    x = torch.ones(2, 6)
    (model(x) - model(2 * x)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_loop_without_optimizer_is_noticed_in_the_next_training_forward():
    model = mlp()
    sigma_reparam(model, steps_at=lambda updates: 1)
    one = members(model)[0]
    for update in range(3):
        model(torch.ones(1, 6)).square().mean().backward()
        model(torch.ones(1, 6))
        assert int(one.updates) == update
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.01 * parameter.grad)
    with torch.no_grad():
        model.eval()(torch.ones(1, 6))
    assert int(one.updates) == 2, "evaluation only reads"
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    advance(model)
    assert int(one.updates) == 3


def test_an_optimizer_of_other_weights_changes_nothing():
    model, other = mlp(), nn.Linear(2, 2)
    sigma_reparam(model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert int(members(model)[0].updates) == 0


def test_more_steps_at_first():
    errors = {}
    for steps in (1, 3):
        torch.manual_seed(6)
        layer = nn.Linear(64, 64, bias=False)
        sigma_reparam(layer, steps_at=lambda updates, steps=steps: steps)
        one = members(layer)[0]
        train(layer, 6, lambda layer: layer(torch.eye(64)[:8]))
        errors[steps] = 1 - (one.gamma.detach().abs() / spectral_norm(layer.weight)).item()
    assert abs(errors[3]) < abs(errors[1])


def test_sigma_follows_training():
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 48))
    sigma_reparam(model)
    data = torch.randn(64, 48)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(200):
        (model(data) - data.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for one in members(model):
        sigma = (one.weight.detach().t() @ one.left).norm()
        # The largest singular values of this toy are within a few percent of each other, which one step cannot tell apart.
        assert 0.85 <= (sigma / spectral_norm(one.weight)).item() <= 1 + 1e-6


def test_bad_weights_leave_the_vectors_alone():
    model = mlp()
    sigma_reparam(model)
    one, optimizer = members(model)[0], torch.optim.SGD(model.parameters(), lr=1.0)
    before, kept = one.left.clone(), one.weight.detach().clone()
    one.weight.grad = torch.full_like(one.weight, float("nan"))
    optimizer.step()
    assert torch.equal(one.left, before)
    with torch.no_grad():
        one.weight.copy_(kept)
    assert model(torch.ones(1, 6)).isfinite().all()


# Start


@pytest.mark.parametrize("start", [None, 1.0, 0.5])
def test_gamma_starts_at_sigma_or_where_it_is_told(start):
    layer = nn.Linear(200, 150)
    sigma = spectral_norm(layer.weight)
    sigma_reparam(layer, gamma=start)
    found = members(layer)[0].gamma.item()
    assert found == pytest.approx(sigma.item() if start is None else start, rel=2e-3)
    assert spectral_norm(layer.weight).item() == pytest.approx(found, rel=2e-3)


def test_gain_starts_gamma_by_the_shape_of_each_part():
    model = nn.ModuleDict({"fused": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 32), "stem": nn.Conv2d(1, 16, 2)})
    handle = sigma_reparam(model, gain=1.5)
    up, fused, stem = model["up"], model["fused"], model["stem"]
    weights = [up.weight, *fused.in_proj_weight.chunk(3), fused.out_proj.weight, stem.weight.flatten(1)]
    for weight, expected in zip(weights, [3.0, 1.5, 1.5, 1.5, 1.5, 3.0], strict=True):
        assert spectral_norm(weight).item() == pytest.approx(expected, rel=2e-3)
    assert handle.settings["gain"] == 1.5
    again = mlp()
    with pytest.raises(ValueError, match=r"gamma=1\.0 and gain=2\.0; leave one out"):
        sigma_reparam(again, gamma=1.0, gain=2.0)
    assert not members(again)


def test_no_draw_from_the_global_generator():
    model = nn.Linear(300, 300)
    state = torch.get_rng_state()
    sigma_reparam(model)
    assert torch.equal(torch.get_rng_state(), state)


# Dtypes and devices


def test_state_stays_in_full_precision_beside_half_precision():
    model = mlp()
    sigma_reparam(model)
    model.bfloat16()
    one = members(model)[0]
    assert (one.left.dtype, one.gamma.dtype, one.weight.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    train(model, 2, lambda model: model(torch.ones(3, 6, dtype=torch.bfloat16)))
    assert (one.left.dtype, one.gamma.grad) == (torch.float32, None)
    wide = one.effective().float()
    assert spectral_norm(wide).item() == pytest.approx(one.gamma.abs().item(), rel=0.01)
    later = mlp().bfloat16()
    kept = later[0].weight.detach().clone()
    sigma_reparam(later)
    assert torch.equal(later[0].weight, kept)
    assert members(later)[0].gamma.dtype == torch.float32


def test_autocast_does_not_touch_sigma():
    model = mlp()
    sigma_reparam(model)
    exact = model[0].weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model[0].weight, exact)
        loss = model(torch.ones(2, 6)).float().square().mean()
        loss.backward()
        inside = [parameter.grad.clone() for parameter in model.parameters()]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(grad.dtype == torch.float32 for grad in inside)
    one = members(model)[0]
    torch.testing.assert_close(one.left.norm(), torch.tensor(1.0))


def test_meta_device():
    with torch.device("meta"):
        model = mlp()
    sigma_reparam(model)
    source = mlp()
    sigma_reparam(source)
    model.to_empty(device="cpu")
    with pytest.raises(PatchError, match=r"0\.weight came from the meta device .* load a checkpoint"):
        model(torch.ones(1, 6))
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(torch.ones(1, 6)), source(torch.ones(1, 6)))
    assert train(model, 1)
    assert int(members(model)[0].updates) == 1

    with torch.device("meta"):
        model = mlp()
    handle = sigma_reparam(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    for one in members(model):
        one.reset_parameters()
    assert torch.equal(model[0].weight, members(model)[0].weight)
    handle.remove()
    assert list(model.state_dict()) == list(mlp().state_dict())


def test_frozen_weights_stay_frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    handle = sigma_reparam(model)
    assert [gamma.requires_grad for gamma in handle.new_parameters] == [False, True]
    model(torch.ones(1, 6)).sum().backward()


# Norms


@pytest.mark.parametrize("name", ["torch encoder", "BERT", "GPT-2", "Llama", "T5", "ours"])
def test_norms_are_removed_and_come_back(name):
    build, run = FAMILIES[name]
    model = build().eval()
    keys, before = list(model.state_dict()), run(model)
    handle = sigma_reparam(model, remove_norms=True)
    assert _norms(model) == {
        "GPT-2": ["transformer.ln_f"],
        "Llama": ["model.norm"],
        "T5": ["encoder.final_layer_norm", "decoder.final_layer_norm"],
        "ours": ["stack.norm"],
    }.get(name, [])
    assert not torch.allclose(run(model), before)
    handle.remove()
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model), before)
    with sigma_reparam(model, remove_norms=True, keep_final_norm=False):
        assert not _norms(model)
    first, *others = _norms(model)
    with sigma_reparam(model, remove_norms=named(first)):
        assert _norms(model) == others


def _norms(model):
    return [path for path, module in model.named_modules() if is_norm(path, module) and not isinstance(module, NoNorm)]


def test_without_norms_torchs_fused_path_is_not_taken():
    model = torch_encoder().eval()
    sigma_reparam(model, remove_norms=True)
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        fused = model(x, src_key_padding_mask=padding)
    plain = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fused[~padding], plain[~padding])


# Refusals


def _conflict():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def _zero():
    model = mlp()
    nn.init.zeros_(model[2].weight)
    return model


def _not_finite():
    model = mlp()
    model[2].weight.data[0, 0] = float("inf")
    return model


def _patched():
    model = mlp()
    sigma_reparam(model)
    return model


def _renormalized():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4, max_norm=1.0), "out": nn.Linear(4, 5)})
    model["out"].weight = model["embedding"].weight
    return model


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (nn.ReLU, {}, "looked for linear layers, convolutions, attention projections, found ReLU"),
        (_patched, {}, r"0\.weight has the parametrization SigmaReparam already"),
        (_conflict, {}, r"0\.weight has the parametrization _WeightNorm already"),
        (_zero, {}, r"2\.weight is zero"),
        (_not_finite, {}, r"2\.weight holds NaN or infinity"),
        (_renormalized, {}, r"embedding\.weight is tied and renormalized"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), {}, r"0\.weight has no shape yet"),
        (mlp, {"where": named("1")}, "1 is a Tanh, which has no weight"),
        (mlp, {"split": lambda *_: Rows((3, 3))}, r"expected parts that make up 10 rows, got Rows\(sizes=\(3, 3\)"),
        (mlp, {"remove_norms": True}, "looked for norms to remove"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_refused_and_left_as_it_was(build, settings, message):
    model = build()
    gc.collect()
    keys, hooks, live = list(model.state_dict()), len(_global_optimizer_post_hooks), len(FOLLOWED.live)
    kept = [id(parameter) for parameter in model.parameters()]
    with pytest.raises(PatchError, match=message):
        sigma_reparam(model, **settings)
    gc.collect()
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == kept
    assert (len(_global_optimizer_post_hooks), len(FOLLOWED.live)) <= (hooks, live)


def test_no_hook_is_left():
    for one in list(FOLLOWED.live):
        FOLLOWED.discard(one)  # those of models that are not collected yet
    others = len(_global_optimizer_post_hooks)
    assert FOLLOWED.hook is None
    with sigma_reparam(mlp()):
        assert len(_global_optimizer_post_hooks) == others + 1
    assert len(_global_optimizer_post_hooks) == others


def test_the_hook_goes_only_where_it_is_the_last():
    """A dictionary of hooks that shrinks while torch walks through it is an error."""
    for one in list(FOLLOWED.live):
        FOLLOWED.discard(one)
    model, other = mlp(), nn.Linear(2, 2)
    sigma_reparam(model)
    called = []
    handle = register_optimizer_step_post_hook(lambda *_: called.append(1))
    del model
    gc.collect()
    optimizer = torch.optim.SGD(other.parameters())
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert called == [1]
    assert FOLLOWED.hook is None


def test_other_parametrizations_may_follow_and_stay():
    layer = nn.Linear(4, 4)
    weight = layer.weight
    handle = sigma_reparam(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
    handle.remove()
    assert torch.equal(layer.weight, weight.tanh())
    assert layer.parametrizations.weight.original is weight


def test_an_average_of_models_has_the_averaged_spectral_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 48))
    sigma_reparam(model, gamma=1.0)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.97), use_buffers=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        x = torch.randn(32, 48)
        model(x).sub(x.roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    found = members(average.eval())
    assert min(abs(one.left.norm().item() - 1) for one in found) > 0.3  # so there is something to mend
    with torch.no_grad():
        average(x)
    for one, layer in zip(found, [average.module[0], average.module[2]], strict=True):
        assert one.left.norm().item() == pytest.approx(1, abs=1e-5)
        assert spectral_norm(layer.weight).item() == pytest.approx(one.gamma.abs().item(), rel=0.05)
    assert torch.equal(average(x), average(x))


def test_evaluation_leaves_singular_vectors_of_length_one_alone():
    model = mlp()
    sigma_reparam(model)
    train(model, 2, lambda model: model(torch.ones(3, 6)))
    kept = [one.left.clone() for one in members(model)]
    model.eval()(torch.ones(3, 6))
    assert all(torch.equal(one.left, left) for one, left in zip(members(model), kept, strict=True))
