"""What `qk_norm`, `soft_cap` and `qk_clip` promise, on every family whose layers we know, with padding, masks and dropout."""

import copy

import pytest
import torch

from tameformer.errors import PatchError
from tameformer.patch import Observation, Observer
from tameformer.patch.adapters import branches
from tameformer.probes import Watch, default_probes
from tameformer.stabilizers import qk_clip, qk_clip_state, qk_norm, soft_cap
from zoo import FAMILIES, main_output, run_steps, traces

KNOWN = ["torch-encoder-post", "torch-encoder-pre-causal", "torch-decoder", "torch-transformer"]
KNOWN += ["encoder-pre", "encoder-post", "encoder-peri", "encoder-none", "decoder", "encoder-decoder", "vision"]
HUGGING_FACE = ["bert", "roberta", "distilbert", "vit", "deit", "gpt2", "llama", "t5", "bart", "marian", "whisper"]
KNOWN += [f"{name}-sdpa" for name in HUGGING_FACE]
MODES = ["train", "eval", "no_grad"]
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Calls(Observer):
    def __init__(self):
        self.seen = {}

    def on_attention(self, call):
        self.seen.setdefault(call.layer, call)


def run(model, inputs, mode, observers=()):
    model.train(mode == "train")
    torch.manual_seed(1)
    with torch.set_grad_enabled(mode != "no_grad"), Observation(model, observers, sequences=None).watching():
        return main_output(model(**inputs))


def calls_of(model, inputs, mode):
    calls = Calls()
    run(model, inputs, mode, [calls])
    return calls.seen


def attentions(model):
    return [branch.attention for branch in branches(model) if branch.attention is not None]


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("mode", MODES)
def test_normalized_queries_and_keys_have_one_length_in_every_call(name, mode):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    handle = qk_norm(model)
    seen = calls_of(model, inputs, mode)
    assert set(handle.names) == set(seen)
    for attention in attentions(model):
        call, width = seen[attention.name], attention.head_dim
        scale = width**-0.5 if call.scale is None else call.scale
        lengths = [part.norm(dim=-1) for part in (call.query, call.key)]
        bound = torch.stack([length.max() for length in lengths]).prod() * scale
        assert bound <= width**0.5 * (1 + 1e-5)
        for length in lengths:  # eps takes a little of short ones
            torch.testing.assert_close(length, length.amax().expand_as(length), rtol=0.01, atol=0)
        assert (call.query @ call.key.repeat_interleave(len(call.query[0]) // len(call.key[0]), 1).mT).abs().max() > 0


@pytest.mark.parametrize("name", [*KNOWN, *(f"{name}-eager" for name in HUGGING_FACE)])
def test_the_size_of_projections_before_norms_does_not_matter(name):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    qk_norm(model)
    with torch.no_grad():
        for attention in attentions(model):  # eps takes nothing of long ones
            for matrix in (attention.query, attention.key):
                enlarge(matrix, 1e2)
    plain = run(model, inputs, "eval")
    with torch.no_grad():
        for attention in attentions(model):
            enlarge(attention.query, 1e3)
    torch.testing.assert_close(run(model, inputs, "eval"), plain, rtol=1e-4, atol=1e-4)


def enlarge(matrix, factor):
    matrix.view().mul_(factor)
    if matrix.bias is not None:
        getattr(matrix.module, matrix.bias)[matrix.start : matrix.stop].mul_(factor)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("mode", MODES)
def test_capped_logits_are_those_of_the_queries_and_keys(name, mode):
    """The first attention of a model, whose input capping does not change, against its own call without a cap."""
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    first = next(iter(calls_of(model, inputs, mode).values()))
    soft_cap(model, cap=0.1)
    seen = calls_of(model, inputs, mode)
    assert {attention.name for attention in attentions(model)} == set(seen)
    capped = seen[first.layer].logits
    query, key = first.query.double(), first.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if first.scale is None else first.scale
    logits = 0.1 * torch.tanh(query @ key.mT * scale / 0.1)
    if first.is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -1e30)
    if first.mask is not None and first.mask.dtype == torch.bool:
        logits = logits.masked_fill(~first.mask, -1e30)  # a padded query may see nothing
    elif first.mask is not None:
        logits = logits + first.mask
    torch.testing.assert_close(capped.double().softmax(-1), logits.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("mode", MODES)
def test_without_their_effect_opened_models_give_the_same(name, mode):
    """With clipping the outputs are the model's; with a cap out of reach, too."""
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    plain = run(model, inputs, mode)
    with qk_clip(model):
        torch.testing.assert_close(run(model, inputs, mode), plain, rtol=1e-5, atol=1e-5)
    with soft_cap(model, cap=1e6):
        found = run(model, inputs, mode)
    if mode != "train":  # torch's kernels draw dropout in their own order
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model, inputs, mode), plain)


@pytest.mark.parametrize("name", KNOWN)
def test_clipping_brings_every_attention_to_the_threshold_or_below(name):
    """One after the other, since each reads what those before it give, from the same random numbers in each pass."""
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    handle = qk_clip(model, threshold=0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = []
    for _ in range(2 + len(handle.names)):
        torch.manual_seed(1)
        main_output(model(**inputs))
        optimizer.step()
        state = qk_clip_state(model)
        found.append(torch.cat([heads.largest_logit for heads in state.values()]))
    assert tuple(state) == handle.names
    assert found[0].max() > 0.1
    assert found[-1].max() <= 0.05 * (1 + 1e-5)
    assert torch.cat([heads.times_clipped for heads in state.values()]).any()
    assert not any(heads.times_not_finite.any() for heads in state.values())
    handle.remove()


@pytest.mark.parametrize("name", KNOWN)
def test_removal_leaves_nothing_and_copies_are_independent(name):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, keys = traces(model, optimizer), list(model.state_dict())
    plain = run(model, inputs, "eval")
    clip = qk_clip(model)
    handles = [soft_cap(model, cap=0.1), qk_norm(model), clip]
    patched, twin = run(model, inputs, "eval"), copy.deepcopy(model)
    assert (patched - plain).abs().max() > 1e-4
    for handle in handles:
        handle.remove()
    assert traces(model, optimizer) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(run(model, inputs, "eval"), plain)
    assert torch.equal(run(twin, inputs, "eval"), patched)
    with torch.no_grad():
        for attention in attentions(twin):
            attention.module.q_norm.weight.zero_()
    assert not torch.equal(run(twin, inputs, "eval"), patched)
    assert torch.equal(run(model, inputs, "eval"), plain)


@pytest.mark.parametrize("name", ["torch-transformer", "decoder", "gpt2-sdpa", "t5-sdpa"])
def test_a_watched_run_of_a_patched_model_is_the_same_run(name):
    runs = []
    for watched in (False, True):
        model = FAMILIES[name].model()
        qk_norm(model)
        soft_cap(model, cap=0.5)
        runs.append(run_steps(model, FAMILIES[name].inputs(), watched=watched))
    assert runs[0].same_run(runs[1])
    entropies = [key for key in runs[1].readings[2] if "attention_entropy" in key]
    assert len(entropies) >= len(attentions(model))
    assert all(value.isfinite().all() for value in runs[1].readings[2].values())


def test_probes_see_all_attention_of_patched_models():
    for name in KNOWN:
        model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
        plain = Watch(model, [(probe, 1) for probe in default_probes(model, [])])
        with plain.watching(1):
            main_output(model(**inputs))
        expected = [key for key in plain.read() if "attention" in key or "head" in key]
        for patch in (qk_norm, soft_cap, qk_clip):
            patch(model := FAMILIES[name].model())
            watch = Watch(model, [(probe, 1) for probe in default_probes(model, [])])
            with watch.watching(1):
                main_output(model(**inputs))
            assert [key for key in watch.read() if "attention" in key or "head" in key] == expected, (name, patch)


@pytest.mark.parametrize("name", [f"{name}-eager" for name in HUGGING_FACE])
def test_eager_attention_is_refused(name):
    model = FAMILIES[name].model()
    for patch in (soft_cap, qk_clip):
        with pytest.raises(PatchError, match=r"is on eager; .* call model\.set_attn_implementation\('sdpa'\)"):
            patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
