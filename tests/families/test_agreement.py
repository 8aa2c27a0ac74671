"""What the probes read, against float64 from materialized attention, singular values, and hooks of the test's own."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tameformer.nn.attention import MultiHeadAttention
from tameformer.probes import AttentionEntropy, Watch, default_probes
from tameformer.probes.exact_attention_entropy import ExactAttentionEntropy
from zoo import FAMILIES, main_output

FIELDS: dict[str, tuple[str, ...]] = {
    "self": ("attentions", "encoder_attentions"),
    "causal": ("attentions", "decoder_attentions"),
}
FIELDS["cross"] = ("cross_attentions",)


@pytest.fixture(autouse=True)
def _torch_in_parts():
    """Torch's fused evaluation calls no module inside, so that hooks would see nothing."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def doubled(inputs):
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def hugging_face_logits(family, model, inputs, monkeypatch):
    """Masked logits by layer: those whose softmax is what the eager model says its attention is."""
    seen, softmax = [], F.softmax

    def recording(input, *args, **kwargs):
        seen.append(input.double())
        return softmax(input, *args, **kwargs)

    monkeypatch.setattr(F, "softmax", recording)
    output = model(**inputs, output_attentions=True)
    monkeypatch.undo()
    numbers = dict.fromkeys(FIELDS, 0)
    found = {}
    for layer, kind in family.attention_layers().items():
        weights = next(each for each in (getattr(output, name, None) for name in FIELDS[kind]) if each)[numbers[kind]]
        numbers[kind] += 1
        alike = [each for each in seen if each.shape == weights.shape]
        (found[layer],) = [each for each in alike if (each.softmax(-1) - weights).abs().max() < 1e-6]
    return found


def torch_logits(module, args, kwargs):
    """Logits of `MultiheadAttention` without mask, and the weights it returns itself."""
    given = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
    _, weights = module(**{**given, "need_weights": True, "average_attn_weights": False, "is_causal": False})
    if module.in_proj_weight is None:
        projections = [module.q_proj_weight, module.k_proj_weight]
    else:
        projections = module.in_proj_weight.chunk(3)[:2]
    query, key = (
        F.linear(given[name], weight, bias).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for name, weight, bias in zip(("query", "key"), projections, module.in_proj_bias.chunk(3), strict=False)
    )
    return query @ key.mT / math.sqrt(query.shape[-1]), weights


def our_logits(module, args, kwargs):
    """Logits of our attention, every query head with its own copy of its key head."""
    x = args[0]
    query = module.query(x).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    key = module.key(kwargs.get("memory", x)).unflatten(-1, (module.num_kv_heads, -1)).transpose(1, 2)
    if module.positions is not None:
        query, key = (module.positions(each.float(), None, start=0).double() for each in (query, key))
    key = key.repeat_interleave(module.num_heads // module.num_kv_heads, 1)
    return query @ key.mT / math.sqrt(module.head_dim), None


def module_logits(family, model, inputs):
    """Unmasked logits by layer, from a hook on each attention module, and the weights where the module tells them."""
    found, removals = {}, []
    for name, module in model.named_modules():
        compute = {nn.MultiheadAttention: torch_logits, MultiHeadAttention: our_logits}.get(type(module))
        if compute is not None:

            def hook(module, args, kwargs, output, name=name, compute=compute):
                if name not in found:
                    found[name] = None  # `torch_logits` calls the module again
                    found[name] = compute(module, args, kwargs)

            removals.append(module.register_forward_hook(hook, with_kwargs=True))
    model(**inputs)
    for removal in removals:
        removal.remove()
    if "" in family.attention:
        joint = (
            model.project if family.name == "plain" else lambda x: F.linear(x, model.in_proj_weight, model.in_proj_bias)
        )
        query, key, _ = (each.unflatten(-1, (2, 8)).transpose(1, 2) for each in joint(inputs["x"]).chunk(3, -1))
        found[""] = query @ key.mT / math.sqrt(8), None
    return found


def attention_rows(logits, visible):
    """(heads, rows, 4), one row after the other: entropy, largest logit, logarithm of the number of keys, 1 for padding."""
    _, heads, queries, keys = logits.shape
    table = [[] for _ in range(heads)]
    for sequence, allowed_keys in enumerate(visible[:, 0]):
        for query, allowed in enumerate(allowed_keys):
            if allowed.any():
                is_padding = queries == keys and not allowed[query]
                for head, rows in enumerate(table):
                    row = logits[sequence, head, query, allowed]
                    weights = row.softmax(0)
                    entropy = -(weights * weights.log()).sum().item()
                    rows.append((entropy, row.max().item(), math.log(len(row)), float(is_padding)))
    return torch.tensor(table, dtype=torch.float64)


def entropy_reference(rows):
    """By name a value a head, or one a layer."""
    entropy, largest, ceiling, _ = rows.unbind(-1)
    return {
        "attention_entropy": entropy.mean(1),
        "attention_entropy_min": entropy.amin(1),
        "attention_logit_max": largest.amax(1),
        "attention_entropy_max": ceiling.mean(),
    }


def reading(model, inputs, probes):
    watch = Watch(model, [(probe, 1) for probe in probes], sequences=None)
    with watch.watching(1):
        model(**inputs)
    return watch.read()


def test_entropies_and_logits_are_those_of_materialized_attention(family, monkeypatch):
    model = family.model().eval()
    values = reading(model, family.inputs(), [AttentionEntropy(rows=1000)])
    exact = reading(model, family.inputs(), [ExactAttentionEntropy()])
    precise, inputs = copy.deepcopy(model).double(), doubled(family.inputs())
    hugging_face = type(model).__module__.startswith("transformers")
    with torch.no_grad():
        if hugging_face:
            precise.set_attn_implementation("eager")
            found = hugging_face_logits(family, precise, inputs, monkeypatch)
        else:
            found = module_logits(family, precise, inputs)
    assert len(found) == len(family.attention_layers())
    spread = 0.0
    for layer, kind in family.attention_layers().items():
        logits, weights = (found[layer], None) if hugging_face else found[layer]
        visible = family.visible(kind, *logits.shape[2:])
        if weights is not None:  # our understanding of the mask is torch's
            expected = logits.masked_fill(~visible, -torch.inf).softmax(-1)
            torch.testing.assert_close(weights, expected.nan_to_num(), atol=1e-9, rtol=0)
        rows = attention_rows(logits, visible)
        for name, reference in entropy_reference(rows[:, rows[0, :, 3] == 0]).items():
            got = values[f"diag/{name}/{layer}"].double()
            torch.testing.assert_close(got, reference, atol=2e-5, rtol=2e-5, msg=f"{name} {layer}: {got}")
        everywhere = entropy_reference(rows)
        for name in ("attention_entropy", "attention_entropy_min"):
            got = exact[f"diag/{name}/{layer}"].double()
            torch.testing.assert_close(got, everywhere[name], atol=2e-5, rtol=0, msg=f"{name} {layer}: {got}")
        least, ceiling = values[f"diag/attention_entropy_min/{layer}"], values[f"diag/attention_entropy_max/{layer}"]
        assert (values[f"diag/attention_entropy_bound/{layer}"] <= values[f"diag/attention_entropy/{layer}"]).all()
        spread = max(spread, (ceiling - least).max().item())
    assert spread > 0.15  # attention that is nearly uniform would agree with anything


PROJECTIONS = ("out", "out_lin", "out_proj", "o_proj", "o", "c_proj")
"""What the projection behind the heads is called."""


def stream_reference(family, model, inputs):
    """By key what is to be read of the residual stream, from hooks on the modules that the family names."""
    inside, outside = {}, {}
    names = {module: name for name, module in model.named_modules()}

    def hook(module, args, kwargs, output):
        inside.setdefault(names[module], next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None))
        outside.setdefault(names[module], output[0] if isinstance(output, tuple) else output)

    removals = [module.register_forward_hook(hook, with_kwargs=True) for module in names]
    output = main_output(model(**inputs))
    for removal in removals:
        removal.remove()
    values = {"diag/log_partition/output": float(output.logsumexp(-1).mean())} if family.has_logits else {}
    for layer in family.attention_layers():
        before = [f"{layer}.{name}" for name in PROJECTIONS] + [layer.removesuffix(".self") + ".output.dense"]
        mixed = next((inside[name] for name in before if name in inside), None)
        if mixed is not None:  # torch's attention calls no module for the projection
            heads = mixed.unflatten(-1, (family.heads, -1))
            sizes = (heads - heads.mean(1, keepdim=True)).square().sum((0, 1, 3))
            values[f"diag/head_output/{layer}"] = (sizes / sizes.mean()).sqrt().tolist()
    for layers in family.layers:
        for block in layers.names():
            stream = inside[block]
            for label, branch_name, norm in layers.sums:
                branch = outside[f"{block}.{branch_name}"]
                energy, others = (float((part**2).mean()) for part in (branch, stream))
                values[f"diag/branch_share/{block}.{label}"] = energy / (energy + others)
                stream = stream + branch if norm is None else outside[f"{block}.{norm}"]
            output = outside[block]
            torch.testing.assert_close(stream, output, rtol=1e-5, atol=1e-6)  # the family names its branches rightly
            values[f"diag/activation_rms/{block}"] = float((output**2).mean().sqrt())
            values[f"diag/activation_absmax/{block}"] = float(output.abs().max())
            centred = output - output.mean()
            values[f"diag/activation_kurtosis/{block}"] = float((centred**4).mean() / (centred**2).mean() ** 2)
            residuals = [float((x - x.mean(0)).norm() / x.norm()) for x in output]
            values[f"diag/rank_residual/{block}"] = sum(residuals) / len(residuals)
            cosines = [F.cosine_similarity(x[:, None], x[None], dim=-1) for x in output]
            pairs = [float((each.sum() - each.trace()) / (each.numel() - len(each))) for each in cosines]
            values[f"diag/token_cosine/{block}"] = sum(pairs) / len(pairs)
    return values


def test_stream_heads_and_logits_are_those_of_the_modules(family):
    model = family.model().eval()
    probes = default_probes(model)
    for probe in probes:
        if hasattr(probe, "sequences"):
            vars(probe)["sequences"] = None  # all tokens
    values = reading(model, family.inputs(), probes)
    with torch.no_grad():
        references = stream_reference(family, copy.deepcopy(model).double(), doubled(family.inputs()))
    by_torch = family.name.startswith("torch") or "" in family.attention
    assert by_torch or {key for key in references if "head_output" in key} == {k for k in values if "head_output" in k}
    for key, reference in references.items():
        assert values[key].tolist() == pytest.approx(reference, rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize(
    "name", ["torch-decoder", "torch-attention-separate", "decoder", "vision", "gpt2-sdpa", "t5-eager"]
)
def test_weights_gradients_and_updates(name):
    family = FAMILIES[name]
    model = family.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)
    watch = Watch(model, [(probe, 1) for probe in default_probes(model, [optimizer])], optimizers=[optimizer])
    before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    with watch.watching(1):
        main_output(model(**family.inputs())).square().mean().backward()
        optimizer.step()
    values = watch.read()
    squares, counts = {}, {}
    for full, parameter in model.named_parameters():
        owner = (full.rpartition(".")[0] or full).partition(".parametrizations.")[0]
        label = full.removesuffix("weight").rstrip("._")
        if parameter.grad is not None:
            squares[owner] = squares.get(owner, 0.0) + float(parameter.grad.double().square().sum())
            counts[owner] = counts.get(owner, 0) + parameter.numel()
        if f"diag/update_ratio/{label}" in values:
            ratio = float((parameter.detach().double() - before[full]).norm() / before[full].norm())
            assert values[f"diag/update_ratio/{label}"].item() == pytest.approx(ratio, rel=1e-3), full
            singular = torch.linalg.svdvals(before[full].flatten(1))
            norm, rank = float(singular[0]), float(singular.square().sum() / singular[0] ** 2)
            assert norm * 0.98 <= values[f"diag/spectral_norm/{label}"].item() <= norm * (1 + 1e-5), full
            assert values[f"diag/stable_rank/{label}"].item() == pytest.approx(rank, rel=0.04), full
    for owner, square in squares.items():
        assert values[f"diag/grad_norm/{owner}"].item() == pytest.approx(math.sqrt(square), rel=1e-5), owner
        relative = math.sqrt(square / counts[owner]) / 1e-6
        assert values[f"diag/grad_rms_over_epsilon/{owner}"].item() == pytest.approx(relative, rel=1e-5), owner
