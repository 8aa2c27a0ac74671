import copy
import gc
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from tameformer.errors import PatchError
from tameformer.models import DecoderConfig, EncoderConfig, decoder, encoder
from tameformer.patch import Observation, Observer, named
from tameformer.patch.adapters import branches
from tameformer.stabilizers.qk_clip import LIVE, qk_clip, qk_clip_state
from tameformer.stabilizers.qk_norm import qk_norm
from tameformer.stabilizers.sigma_reparam import sigma_reparam
from tameformer.stabilizers.soft_cap import soft_cap
from two_processes import in_two

IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(3))
HF = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


def our_encoder():
    return encoder(EncoderConfig(dim=16, num_heads=4, num_layers=1), vocab_size=20), "tokens"


def our_decoder():
    config = DecoderConfig(dim=16, num_heads=4, num_kv_heads=2, num_layers=1, positions="rotary")
    return decoder(config, vocab_size=20), "tokens"


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True)
        self.stack = nn.TransformerEncoder(layer, 1)

    def forward(self, tokens):
        future = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.stack(self.embed(tokens), mask=future, is_causal=True)


def bert():
    config = BertConfig(**HF, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertModel(config, add_pooling_layer=False), "input_ids"


def gpt2():
    config = {"n_embd": 16, "n_layer": 1, "n_head": 4, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return GPT2Model(GPT2Config(vocab_size=20, **config, bos_token_id=1, eos_token_id=1, use_cache=False)), "input_ids"


def llama():
    return LlamaModel(LlamaConfig(**HF, num_key_value_heads=2, use_cache=False)), "input_ids"


FAMILIES = {
    "encoder": our_encoder,
    "decoder-grouped-rotary": our_decoder,
    "torch": lambda: (Embedded(), "tokens"),
    "bert": bert,
    "gpt2-fused": gpt2,
    "llama-grouped-rotary": llama,
}


def built(family):
    """With logits of very different sizes in its heads, and biases that matter."""
    torch.manual_seed(0)
    model, argument = FAMILIES[family]()
    model = model.double().train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        attention = attention_of(model)
        sizes = torch.logspace(-1, 0.5, attention.num_heads, dtype=torch.float64)
        scale(attention.query, sizes.repeat_interleave(attention.head_dim))
    return model, (lambda tokens: model(**{argument: tokens}))


def attention_of(model):
    return next(branch.attention for branch in branches(model) if branch.attention is not None)


def scale(matrix, factors):
    matrix.view().mul_(factors[:, None])
    if matrix.bias is not None:
        getattr(matrix.module, matrix.bias)[matrix.start : matrix.stop].mul_(factors)


class Calls(Observer):
    def __init__(self):
        self.seen = []

    def on_attention(self, call):
        self.seen.append(call)


def measured(model, run, tokens):
    """Largest allowed logit of each head, in float64, the slow way."""
    calls = Calls()
    with Observation(model, [calls], sequences=None).watching(), torch.no_grad():
        run(tokens)
    (call,) = calls.seen
    query, key = call.query, call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if call.is_causal:
        allowed = allowed.tril()
    if call.mask is not None:
        allowed &= call.mask if call.mask.dtype == torch.bool else call.mask > -1e30
    return logits.masked_fill(~allowed, -torch.inf).amax((0, 2, 3))


def output_of(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


def backward(output):
    output_of(output).square().mean().backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.8])
def test_after_the_step_the_largest_logit_is_the_threshold(family, alpha):
    """With a learning rate of 0, so that the weights change by clipping alone."""
    model, run = built(family)
    twin = copy.deepcopy(model)
    attention = attention_of(model)
    before = measured(model, run, IDS)
    shared = before.view(attention.num_kv_heads, -1).amax(-1)
    threshold = float(shared.sort().values[-2:].mean())
    handle = qk_clip(model, threshold=threshold, alpha=alpha)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for part in IDS.flip(0).chunk(2):  # two micro-batches with different maxima
        backward(run(part))
    optimizer.step()
    after = measured(model, run, IDS)
    groups = shared > threshold
    assert groups.any()
    assert not groups.all()
    clipped = groups.repeat_interleave(attention.num_heads // attention.num_kv_heads)
    expected = before * torch.where(groups, threshold / shared, 1.0).repeat_interleave(
        attention.num_heads // attention.num_kv_heads
    )
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)
    assert torch.equal(after[~clipped], before[~clipped])
    torch.testing.assert_close(
        after.view(len(shared), -1).amax(-1)[groups], shared[groups] * 0 + threshold, rtol=1e-5, atol=0
    )
    # Nothing but rows of clipped heads in W_q and W_k, and their biases, has changed.
    with torch.no_grad():
        factors = torch.where(groups, threshold / shared, 1.0)
        same = attention_of(twin)
        served = attention.num_heads // attention.num_kv_heads
        scale(same.query, (factors**alpha).repeat_interleave(served * attention.head_dim))
        scale(same.key, (factors ** (1 - alpha)).repeat_interleave(attention.head_dim))
    for (name, found), wanted in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, msg=name)
    state = qk_clip_state(model)[attention.name]
    torch.testing.assert_close(state.largest_logit.double(), shared, rtol=1e-6, atol=0)
    assert torch.equal(state.times_clipped, groups.long())
    handle.remove()


def test_the_largest_of_all_micro_batches_counts_once():
    """Maxima start over after each step, and evaluation is not counted."""
    model, run = built("encoder")
    attention = attention_of(model)
    qk_clip(model, threshold=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    each = torch.stack([measured(model, run, part) for part in IDS.split(1)])
    assert len(set(each.argmax(0).tolist())) > 1
    optimizer.step()  # takes what the measurements above left
    for parts in ((0, 2), (1,), (3, 1, 0)):
        for part in parts:
            run(IDS[part : part + 1])
        model.eval()
        run(IDS)
        model.train()
        optimizer.step()
        largest = qk_clip_state(model)[attention.name].largest_logit.double()
        torch.testing.assert_close(largest, each[list(parts)].amax(0), rtol=1e-6, atol=0)


def test_a_head_with_negative_logits_only_is_left_alone():
    model, run = built("encoder")
    attention = attention_of(model)
    with torch.no_grad():
        scale(attention.query, torch.zeros(16, dtype=torch.float64))
        scale(attention.key, torch.zeros(16, dtype=torch.float64))
        attention.query.module.bias[:4], attention.key.module.bias[:4] = 10.0, -10.0
    before = [p.clone() for p in model.parameters()]
    qk_clip(model, threshold=100.0)
    run(IDS)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    assert qk_clip_state(model)[attention.name].largest_logit[0] == -200
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def with_last_head(output, value):
    return torch.cat([output[..., :12], torch.full_like(output[..., 12:], value)], -1)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_head_that_is_not_finite_is_left_alone_and_counted(bad):
    model, run = built("encoder")
    attention = attention_of(model)
    before = measured(model, run, IDS)
    qk_clip(model, threshold=float(before.min()) / 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    query, key = attention.query.module, attention.key.module
    hooks = [
        query.register_forward_hook(lambda module, args, output: with_last_head(output, bad)),
        key.register_forward_hook(lambda module, args, output: with_last_head(output, 1.0)),
    ]
    run(IDS)
    for hook in hooks:
        hook.remove()
    run(IDS)  # a sound micro-batch does not hide it
    kept = query.weight[12:].clone()
    optimizer.step()
    state = qk_clip_state(model)[attention.name]
    assert state.times_not_finite.tolist() == [0, 0, 0, 1]
    assert state.times_clipped.tolist() == [1, 1, 1, 0]
    assert state.largest_logit.isnan().tolist() == [False, False, False, True]
    assert torch.equal(query.weight[12:], kept)
    assert all(p.isfinite().all() for p in model.parameters())
    run(IDS)
    optimizer.step()
    assert qk_clip_state(model)[attention.name].times_not_finite.tolist() == [0, 0, 0, 1]
    assert qk_clip_state(model)[attention.name].times_clipped[3] == 1


def test_outputs_and_gradients_are_those_of_the_model():
    for family in FAMILIES:
        model, run = built(family)
        twin = copy.deepcopy(model)
        plain = output_of(run(IDS))
        backward(plain)
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        qk_clip(model)
        clipped = output_of(run(IDS))
        torch.testing.assert_close(clipped, plain, rtol=1e-12, atol=1e-12)
        backward(clipped)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)
        del twin


def test_only_a_step_of_the_weights_clips():
    model, run = built("encoder")
    other = nn.Linear(2, 2)
    qk_clip(model, threshold=1e-3)
    run(IDS)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert not qk_clip_state(model)[attention_of(model).name].times_clipped.any()
    torch.optim.AdamW(model.parameters(), lr=0.0).step()
    assert qk_clip_state(model)[attention_of(model).name].times_clipped.all()


def test_it_tames_a_rate_at_which_logits_grow():
    """AdamW at a large rate: without clipping the largest logit passes the threshold twofold."""
    largest = {}
    for clipped in (False, True):
        model, run = built("encoder")
        if clipped:
            qk_clip(model, threshold=20.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        seen = []
        for _ in range(30):
            optimizer.zero_grad()
            backward(run(IDS))
            optimizer.step()
            seen.append(measured(model, run, IDS).max())
        largest[clipped] = float(torch.stack(seen[5:]).max())
    assert largest[False] > 40
    assert largest[True] < 25  # beyond the threshold by one step's growth


def test_removal_is_exact_and_the_hook_goes_with_the_last():
    model, run = built("torch")
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    keys = list(model.state_dict())
    for end in ("remove", "bake"):
        handle = qk_clip(model, threshold=1e-3)
        assert handle.settings == {"threshold": 1e-3, "alpha": 0.5}
        assert list(model.state_dict()) == keys
        run(IDS)
        getattr(handle, end)()
        assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes
        assert qk_clip_state(model) == {}
        weights = [p.clone() for p in model.parameters()]
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for clip in list(LIVE.live):  # of other tests' models
        LIVE.discard(clip)
    assert LIVE.hook is None
    handle = qk_clip(model)
    assert LIVE.hook is not None
    handle.remove()
    assert LIVE.hook is None


def test_a_model_that_is_gone_takes_the_hook_with_it():
    for clip in list(LIVE.live):
        LIVE.discard(clip)
    model, run = built("encoder")
    qk_clip(model)
    called = []
    after = register_optimizer_step_post_hook(lambda *_: called.append(1))
    del model, run
    gc.collect()
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.0)
    optimizer.step()  # torch walks through the hooks, of which the first cannot go now
    after.remove()
    optimizer.step()
    assert called == [1]
    assert LIVE.hook is None


def test_copies_clip_their_own_weights():
    model, _ = built("encoder")
    handle = qk_clip(model, threshold=1e-3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        kept = [p.clone() for p in model.parameters()]
        twin(tokens=IDS)
        torch.optim.SGD(twin.parameters(), lr=0.0).step()
        (state,) = qk_clip_state(twin).values()
        assert state.times_clipped.all()
        assert all(torch.equal(p, k) for p, k in zip(model.parameters(), kept, strict=True))
    assert not next(iter(qk_clip_state(model).values())).times_clipped.any()
    handle.remove()
    twin(tokens=IDS)  # goes on
    torch.optim.SGD(twin.parameters(), lr=0.0).step()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_pass_changes_nothing(use_reentrant):
    weights = []
    for recomputed in (False, True):
        model, run = built("llama-grouped-rotary")
        if recomputed:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
        qk_clip(model, threshold=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            backward(run(IDS))
            optimizer.step()
        assert qk_clip_state(model)["layers.0.self_attn"].times_clipped.any()
        weights.append([p.clone() for p in model.parameters()])
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=1e-12)


def test_it_stands_beside_a_soft_cap_and_measures_before_it():
    model, run = built("encoder")
    before = measured(model, run, IDS)
    handles = [soft_cap(model, cap=1.0), qk_clip(model, threshold=1e9)]
    run(IDS)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    (state,) = qk_clip_state(model).values()
    torch.testing.assert_close(state.largest_logit.double(), before, rtol=1e-6, atol=0)
    for handle in handles:
        handle.remove()
    assert "forward" not in vars(attention_of(model).module)


def test_refusals():
    model, _ = built("encoder")
    name = "stack.layers.0.attention.branch"
    handle = qk_clip(model)
    with pytest.raises(PatchError, match=f"qk_clip is on {name} already"):
        qk_clip(model)
    handle.remove()
    for given in ({"threshold": 0.0}, {"threshold": float("nan")}, {"alpha": -0.1}, {"alpha": 1.1}):
        with pytest.raises(ValueError, match="expected threshold above 0 and alpha from 0 to 1"):
            qk_clip(model, **given)
    with pytest.raises(PatchError, match="where= takes no attention"):
        qk_clip(model, where=named("nothing"))
    normed = qk_norm(model)
    with pytest.raises(PatchError, match=f"{name} normalizes its queries or keys, which undoes what qk_clip would do"):
        qk_clip(model)
    normed.remove()
    with pytest.raises(PatchError, match="normalizes its queries"):
        qk_clip(Qwen3Model(Qwen3Config(**HF, num_key_value_heads=2, head_dim=4)))
    reparametrized = sigma_reparam(model)
    with pytest.raises(PatchError, match=rf"{name}.query.weight is computed by another patch; bake that first"):
        qk_clip(model)
    reparametrized.remove()
    attention_of(model).key.module.weight = attention_of(model).query.module.weight
    with pytest.raises(PatchError, match=rf"{name}.query.weight also where else it serves; untie it"):
        qk_clip(model)
    eager = LlamaModel(LlamaConfig(**HF, num_key_value_heads=2, attn_implementation="eager"))
    with pytest.raises(PatchError, match="is on eager"):
        qk_clip(eager)
    assert not any("forward" in vars(module) for module in [*model.modules(), *eager.modules()])


def clipped(rank):
    found = {}
    for kind in ("ddp", "fsdp"):
        for family in ("encoder", "gpt2-fused"):
            model, _ = built(family)
            qk_clip(model, threshold=2.0, alpha=0.3)
            if kind == "ddp":
                wrapped = DistributedDataParallel(model)
            else:
                wrapped = fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
            argument = "tokens" if family == "encoder" else "input_ids"
            optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                for part in IDS.chunk(2)[rank].split(1):
                    (output_of(wrapped(**{argument: part})).square().mean() / 2).backward()
                optimizer.step()
            state = model.state_dict()
            found[kind, family] = {
                **{k: (v.full_tensor() if hasattr(v, "full_tensor") else v) for k, v in state.items()},
                "clipped": next(iter(qk_clip_state(model).values())).times_clipped,
            }
    return found


def test_two_processes_clip_as_one(tmp_path):
    (first,), (second,) = in_two((clipped,), tmp_path)
    for (kind, family), found in first.items():
        model, run = built(family)
        qk_clip(model, threshold=2.0, alpha=0.3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            backward(run(IDS))
            optimizer.step()
        expected = {**model.state_dict(), "clipped": next(iter(qk_clip_state(model).values())).times_clipped}
        assert expected["clipped"].any()
        for name, value in expected.items():
            assert torch.equal(found[name], second[kind, family][name]), (kind, family, name)
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=f"{kind} {family} {name}")
