"""Watching changes nothing, leaves nothing behind, and sees everything that is there."""

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from tameformer.nn.embedding import TokenEmbedding
from tameformer.nn.positions import LearnedPositions
from tameformer.probes import Probe, Watch, default_probes
from zoo import FAMILIES, main_output, run_steps, traces

PER_HEAD = ("attention_entropy", "attention_entropy_error", "attention_entropy_min", "attention_entropy_bound")
PER_HEAD += ("attention_logit_max", "head_output")
PER_BLOCK = ("activation_rms", "activation_absmax", "activation_kurtosis", "rank_residual", "token_cosine")
TABLES = (nn.Embedding, TokenEmbedding, LearnedPositions)


def matrices(model):
    """Names of the weights that are one matrix, in the model's order."""
    found = []
    for name, parameter in model.named_parameters():  # tied ones once
        owner = model.get_submodule(name.rpartition(".")[0])
        axes = parameter.dim() > 2 if isinstance(owner, _ConvNd) else parameter.dim() == 2
        if (axes or parameter.dim() == 2) and not isinstance(owner, TABLES) and parameter.shape[0] > 1:
            found.append(name.removesuffix("weight").rstrip("._"))
    return found


def expected(family, model):
    """What must be measured: by key the number of heads, None for one value."""
    keys = {f"diag/{name}/{layer}": family.heads for layer in family.attention_layers() for name in PER_HEAD}
    keys |= {f"diag/attention_entropy_max/{layer}": None for layer in family.attention_layers()}
    for layers in family.layers:
        for block in layers.names():
            keys |= {f"diag/{name}/{block}": None for name in PER_BLOCK}
            keys |= {f"diag/branch_share/{block}.{label}": None for label, *_ in layers.sums}
            keys[f"diag/dead_units/{block}.{layers.activation}".rstrip(".")] = None
    if family.has_logits:
        keys["diag/log_partition/output"] = None
    for name in matrices(model):
        keys |= {f"diag/{quantity}/{name}": None for quantity in ("spectral_norm", "stable_rank", "update_ratio")}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            owner = (name.rpartition(".")[0] or name).partition(".parametrizations.")[0]
            keys |= {f"diag/{quantity}/{owner}": None for quantity in ("grad_norm", "grad_rms_over_epsilon")}
    return keys


def test_a_watched_run_is_the_same_run_and_everything_is_seen(family):
    plain = run_steps(family.model(), family.inputs(), watched=False)
    model = family.model()
    watched = run_steps(model, family.inputs(), watched=True)  # which checks that nothing is left on it
    assert watched.same_run(plain)
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    assert tuple(line.split(":")[0] for line in watched.unseen) == family.unseen
    assert list(watched.readings) == [2, 4]
    for values in watched.readings.values():
        assert {key: len(value) if value.dim() else None for key, value in values.items()} == expected(family, model)
        assert [key for key, value in values.items() if not value.isfinite().all()] == []
    for key in watched.readings[2]:
        layer = key.split("/", 2)[2]
        if ".branch_" in layer:  # a sum that no module stands for is numbered in its layer
            layer = layer.rpartition(".")[0]
        known = names | {"output"} | {name.removesuffix("weight").rstrip("._") for name in names}
        assert layer in known, key


class Bad(Probe):
    """Fails when told."""

    def __init__(self, event):
        self.event = event
        setattr(self, event, self._fail)

    def _fail(self, *args):
        raise ArithmeticError("bad probe")

    def on_attention(self, call): ...

    def on_heads(self, layer, output): ...

    def on_branch(self, layer, residual, branch): ...

    def on_activation(self, layer, output): ...

    def on_block(self, block, input, output): ...


EVENTS = ["on_begin", "on_attention", "on_heads", "on_branch", "on_activation", "on_block", "on_output"]
EVENTS += ["on_gradients", "on_update"]


@pytest.mark.parametrize("name", ["torch-transformer", "bart-eager"])
@pytest.mark.parametrize("event", EVENTS)
def test_nothing_is_left_after_an_exception_in_a_probe(name, event):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    optimizer = torch.optim.AdamW(model.parameters())
    before = traces(model, optimizer)
    probes = [*default_probes(model, [optimizer]), Bad(event)]
    context = Watch(model, [(probe, 1) for probe in probes], optimizers=[optimizer]).watching(1)

    def step():
        context.__enter__()  # as in a loop of statements: nobody closes it after the exception
        main_output(model(**inputs)).mean().backward()
        optimizer.step()

    with pytest.raises(ArithmeticError, match="bad probe"):
        step()
    assert traces(model, optimizer) == before


@pytest.mark.parametrize("name", ["torch-transformer", "vision", "llama-sdpa", "t5-eager"])
@pytest.mark.parametrize("as_statements", [False, True])
def test_nothing_is_left_after_an_exception_in_the_model(name, as_statements):
    model, inputs = FAMILIES[name].model(), FAMILIES[name].inputs()
    optimizer = torch.optim.AdamW(model.parameters())
    deepest = list(model.modules())[-1]

    def fail(*args):
        raise RuntimeError("bad model")

    failing = deepest.register_forward_pre_hook(fail)
    before = traces(model, optimizer)
    watch = Watch(model, [(p, 1) for p in default_probes(model, [optimizer])], optimizers=[optimizer])
    context = watch.watching(1)

    def step():
        if as_statements:  # as in a loop: nobody closes the context after the exception
            context.__enter__()
            model(**inputs)
        else:
            with context:
                model(**inputs)

    with pytest.raises(RuntimeError, match="bad model"):
        step()
    assert traces(model, optimizer) == before
    failing.remove()


NON_FINITE = [
    "torch-encoder-post",
    "torch-transformer",
    "plain",
    "encoder-post",
    "decoder",
    "encoder-decoder",
    "vision",
]
NON_FINITE += ["bert-eager", "gpt2-sdpa", "llama-eager", "t5-sdpa", "bart-eager", "whisper-sdpa", "wav2vec2-sdpa"]


@pytest.mark.parametrize("name", NON_FINITE)
def test_a_non_finite_value_is_told_and_leaves_the_next_reading_alone(name):
    family = FAMILIES[name]
    model, inputs = family.model(), family.inputs()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = Watch(model, [(p, 1) for p in default_probes(model, [optimizer])], optimizers=[optimizer])
    good = [parameter.detach().clone() for parameter in model.parameters()]
    matrix = matrices(model)[0]
    broken = next(p for name, p in model.named_parameters() if name.startswith(matrix))
    readings = []
    for step, entry in enumerate((None, torch.inf, None), start=1):
        optimizer.zero_grad()
        optimizer.state.clear()
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), good, strict=True):
                parameter.copy_(weight)
            if entry is not None:
                broken.view(-1)[0] = entry
        torch.manual_seed(1)
        with watch.watching(step):
            main_output(model(**inputs)).float().square().mean().backward()
            optimizer.step()
        readings.append({key: value.clone() for key, value in watch.read().items()})
    first, bad, after = readings
    assert not bad[f"diag/spectral_norm/{matrix}"].isfinite()
    assert not all(value.isfinite().all() for key, value in bad.items() if "/grad_norm/" in key)
    assert first.keys() == bad.keys() == after.keys()
    for key, value in first.items():
        goes_on = key.split("/")[1] in ("spectral_norm", "stable_rank")  # from the vectors of the last good step
        assert torch.allclose(after[key], value, rtol=0.02) if goes_on else torch.equal(after[key], value), key
