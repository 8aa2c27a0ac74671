import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import orthogonal

from tameformer.models import EncoderConfig, encoder
from tameformer.patch import Observation
from tameformer.probes import spectral_norm
from tameformer.probes.gradients import GradientNorm
from tameformer.probes.spectral_norm import SpectralNorm, power_step, stable_rank
from tameformer.probes.update_ratio import UpdateRatio
from tameformer.stabilizers.layer_scale import layer_scale
from tameformer.stabilizers.sigma_reparam import sigma_reparam


def gpt2():
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=16)
    )


MODELS = {
    "ours": lambda: encoder(EncoderConfig(dim=32, num_layers=2, num_heads=2), vocab_size=64),
    "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2),
    "gpt2": gpt2,
    "convolution": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 5)),
}


def by_svd(weight):
    values = torch.linalg.svdvals(weight.detach().double().flatten(1))
    return values[0].float(), (values.square().sum() / values[0].square()).float()


def observe(model, probe):
    with Observation(model, [probe]).watching():
        return probe.read()


@pytest.mark.parametrize("batched", [False, True], ids=["loop", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_svd_on_every_matrix_of_a_model(name, batched, monkeypatch):
    if batched:
        monkeypatch.setattr(spectral_norm, "_loop_step", spectral_norm._batch_step)
        monkeypatch.setattr(spectral_norm, "_BATCH_ENTRIES", 3000)  # some batches of several, some of one
    torch.manual_seed(0)
    model = MODELS[name]()
    values = observe(model, SpectralNorm(model, cold_steps=200))
    seen = 0
    for full, parameter in model.named_parameters():
        label = full.removesuffix("weight").rstrip("._")
        key = f"diag/spectral_norm/{label}"
        is_table = full.endswith(("wte.weight", "wpe.weight", "embedding.weight", "positions.table"))
        assert (key in values) == (parameter.dim() > 1 and not is_table), full
        if key in values:
            seen += 1
            norm, rank = by_svd(parameter)
            torch.testing.assert_close(values[key], norm, rtol=2e-3, atol=0)
            torch.testing.assert_close(values[f"diag/stable_rank/{label}"], rank, rtol=4e-3, atol=0)
    assert len(values) == 2 * seen > 2


def test_the_joint_projection_is_one_matrix_and_tied_weights_count_once():
    model = MODELS["torch"]()
    assert "diag/spectral_norm/layers.0.self_attn.in_proj" in observe(model, SpectralNorm(model))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert set(observe(model, SpectralNorm(model))) == {"diag/spectral_norm/0", "diag/stable_rank/0"}


def test_first_value_is_within_one_percent_in_the_median():
    torch.manual_seed(0)
    model = encoder(EncoderConfig(dim=128, num_layers=4, num_heads=4), vocab_size=64)
    values = observe(model, SpectralNorm(model))
    errors = torch.stack(
        [
            1 - values[f"diag/spectral_norm/{name}"] / torch.linalg.matrix_norm(module.weight, 2)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
    )
    assert errors.median() < 0.01
    assert errors.max() < 0.05
    assert errors.min() > -1e-5  # never above the norm


def test_follows_weights_that_move_with_one_step_each():
    torch.manual_seed(0)
    model = nn.Linear(64, 48)
    probe = SpectralNorm(model)
    observe(model, probe)
    for _ in range(100):
        with torch.no_grad():
            model.weight += 1e-3 * torch.randn(48, 64).sign()
        values = observe(model, probe)
    norm, rank = by_svd(model.weight)
    torch.testing.assert_close(values["diag/spectral_norm/weight"], norm, rtol=0.01, atol=0)
    torch.testing.assert_close(values["diag/stable_rank/weight"], rank, rtol=0.02, atol=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [(0, 0), (slice(None), slice(None))], ids=["entry", "all"])
@pytest.mark.parametrize("batched", [False, True], ids=["loop", "batch"])
def test_non_finite_weights_pass_through_and_leave_no_trace(bad, where, batched, monkeypatch):
    if batched:
        monkeypatch.setattr(spectral_norm, "_loop_step", spectral_norm._batch_step)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    probe = SpectralNorm(model, cold_steps=500)
    before = observe(model, probe)
    good = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[where] = bad
    during = observe(model, probe)
    assert not during["diag/spectral_norm/0"].isfinite()
    assert not during["diag/stable_rank/0"].isfinite()
    torch.testing.assert_close(during["diag/spectral_norm/1"], before["diag/spectral_norm/1"])  # its neighbour
    with torch.no_grad():
        model[0].weight.copy_(good)
    torch.testing.assert_close(observe(model, probe), before)


def test_zero_weights_read_zero_and_are_found_when_they_grow():
    model = nn.Linear(8, 8)
    nn.init.zeros_(model.weight)
    probe = SpectralNorm(model)
    assert all(value == 0 for value in observe(model, probe).values())
    with torch.no_grad():
        model.weight.copy_(torch.eye(8))
    values = observe(model, probe)
    torch.testing.assert_close(list(values.values()), [torch.tensor(1.0), torch.tensor(8.0)])


@pytest.mark.parametrize("batched", [False, True], ids=["loop", "batch"])
def test_half_precision_weights_are_measured_in_fp32(batched, monkeypatch):
    if batched:
        monkeypatch.setattr(spectral_norm, "_loop_step", spectral_norm._batch_step)
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = observe(model, SpectralNorm(model, cold_steps=1000))
    norm, rank = by_svd(model.weight)
    torch.testing.assert_close(values["diag/spectral_norm/weight"], norm, rtol=3e-4, atol=0)
    torch.testing.assert_close(values["diag/stable_rank/weight"], rank, rtol=6e-4, atol=0)


def test_what_is_left_out_is_named():
    model = nn.ModuleDict({"plain": nn.Linear(4, 4), "orthogonal": orthogonal(nn.Linear(4, 4))})
    model.register_parameter("experts", nn.Parameter(torch.zeros(3, 4, 5)))
    model["meta"] = nn.Linear(4, 4, device="meta")
    probe = SpectralNorm(model)
    assert set(observe(model, probe)) == {"diag/spectral_norm/plain", "diag/stable_rank/plain"}
    assert set(probe.unseen) == {"experts", "orthogonal.weight", "meta"}
    assert "3 axes" in probe.unseen["experts"]
    assert "parametrization" in probe.unseen["orthogonal.weight"]
    assert "meta" in probe.unseen["meta"]


def test_sharded_weights_are_named_by_all_and_sampled_by_the_update_ratio():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    nn.init.ones_(model[0].weight)
    norm, gradient, update = SpectralNorm(model), GradientNorm(model), UpdateRatio(model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))  # after the probes were made
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        with Observation(model, [norm, gradient, update], optimizers=[optimizer]).watching():
            model[0].weight.grad = torch.ones_like(model[0].weight)
            model[1].weight.grad = torch.ones(4, 4)
            optimizer.step()
        assert set(norm.read()) == {"diag/spectral_norm/1", "diag/stable_rank/1"}
        assert set(gradient.read()) == {"diag/grad_norm/1"}
        assert float(update.read()["diag/update_ratio/0"]) == pytest.approx(0.1)
        assert "DTensor" in norm.unseen["0"]
        assert "DTensor" in gradient.unseen["0.weight"]
    finally:
        distributed.destroy_process_group()


@given(rows=st.integers(2, 6), columns=st.integers(2, 6), seed=st.integers(0, 999))
def test_a_power_step_raises_sigma_up_to_the_norm(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    right = nn.functional.normalize(torch.randn(columns, generator=generator, dtype=torch.float64), dim=0)
    norm, sigma = torch.linalg.matrix_norm(weight, 2), torch.tensor(0.0, dtype=torch.float64)
    for _ in range(5):
        last = sigma
        sigma, left, right = power_step(weight, right)
        assert last - 1e-12 <= sigma <= norm + 1e-12
        torch.testing.assert_close(left.norm(), right.norm())
        torch.testing.assert_close(weight.T @ left, sigma * right)
    rank = stable_rank(weight, norm)
    assert 1 - 1e-12 <= rank <= min(rows, columns) + 1e-12


def test_the_global_generator_is_not_used():
    model = nn.Linear(8, 8)
    state = torch.get_rng_state()
    first = observe(model, SpectralNorm(model))
    assert torch.equal(state, torch.get_rng_state())
    assert first == observe(model, SpectralNorm(model))


def test_refuses_no_step():
    with pytest.raises(ValueError, match="got cold_steps=0 and steps=1"):
        SpectralNorm(nn.Linear(2, 2), cold_steps=0)


def test_norms_that_sigma_reparam_knows_are_taken_over():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    handle = sigma_reparam(model)
    for gamma in handle.new_parameters:
        gamma.data.mul_(-1.5)
    probe = SpectralNorm(model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(spectral_norm, "_loop_step", lambda *_: pytest.fail("a power step was taken"))
        values = observe(model, probe)
    layer = model.layers[0]
    weights = {"linear1": layer.linear1.weight, "linear2": layer.linear2.weight}
    weights["self_attn.out_proj"] = layer.self_attn.out_proj.weight
    weights |= {f"self_attn.in_proj[{i}]": part for i, part in enumerate(layer.self_attn.in_proj_weight.chunk(3))}
    assert len(values) == 2 * len(weights)
    for name, weight in weights.items():
        norm, rank = by_svd(weight)
        torch.testing.assert_close(values[f"diag/spectral_norm/layers.0.{name}"], norm, rtol=1e-5, atol=0)
        torch.testing.assert_close(values[f"diag/stable_rank/layers.0.{name}"], rank, rtol=1e-5, atol=0)
    assert not probe.unseen
    layer_scale(model, init=0.5)  # one more on some of them: what either knows is no longer the whole
    probe = SpectralNorm(model)
    assert "diag/spectral_norm/layers.0.linear1" in observe(model, probe)
    assert set(probe.unseen) == {"layers.0.linear2.weight", "layers.0.self_attn.out_proj.weight"}
