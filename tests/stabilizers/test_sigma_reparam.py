"""What the handle promises, over every family of models, and what is refused."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from reparametrized import FAMILIES, TOKENS, gpt2, members, mlp, spectral_norm, torch_encoder, train
from tameformer.errors import PatchError
from tameformer.patch import named
from tameformer.stabilizers.norm_removal import NoNorm, is_norm
from tameformer.stabilizers.sigma_reparam import Rows, sigma_reparam
from tameformer.stabilizers.sigma_weight import FOLLOWED

family = pytest.mark.parametrize(("build", "run"), FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


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
    assert (one.right.dtype, one.gamma.dtype, one.weight.dtype) == (torch.float32, torch.float32, torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    train(model, 2, lambda model: model(torch.ones(3, 6, dtype=torch.bfloat16)))
    assert (one.right.dtype, one.gamma.grad) == (torch.float32, None)
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
    torch.testing.assert_close(one.right.norm(), torch.tensor(1.0))


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
    assert min(abs(one.right.norm().item() - 1) for one in found) > 0.3  # so there is something to mend
    with torch.no_grad():
        average(x)
    for one, layer in zip(found, [average.module[0], average.module[2]], strict=True):
        assert one.right.norm().item() == pytest.approx(1, abs=1e-5)
        assert spectral_norm(layer.weight).item() == pytest.approx(one.gamma.abs().item(), rel=0.05)
    assert torch.equal(average(x), average(x))
