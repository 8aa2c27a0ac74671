import copy
import json
import math

import pytest
import torch
from torch import nn

from tameformer.health import Diagnosis, diagnose, judge
from tameformer.health.verdicts import RULES, concern


def model_of(seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.1, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 7))


def loss(model, batch):
    return model(batch).logsumexp(-1).mean()


def test_the_model_is_left_as_it_was_to_the_bit():
    model = model_of().train()
    model[0].layers[0].eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss(model, torch.randn(2, 5, 16)).backward()
    optimizer.step()
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    diagnose(model, torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)), loss=loss, optimizer=optimizer)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, states["state"][number][key]) for key, value in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_every_quantity_is_in_the_table():
    model = model_of()
    report = diagnose(model, torch.randn(2, 5, 16), loss=loss, optimizer=torch.optim.AdamW(model.parameters()))
    quantities = {key.split("/")[1] for key in report.values}
    assert quantities == {
        *("attention_entropy", "attention_entropy_share", "attention_entropy_min", "attention_entropy_bound"),
        *("attention_logit_max", "head_output", "branch_share", "dead_units", "activation_rms", "activation_absmax"),
        *("activation_kurtosis", "rank_residual", "token_cosine", "spectral_norm", "stable_rank", "grad_norm"),
        *("grad_rms_over_epsilon", "update_ratio", "log_partition", "amplification_random", "amplification_gradient"),
    }
    assert report.unseen == ()
    heads = report.tables["Attention heads"]
    assert [(row.layer, row.head) for row in heads] == [
        (f"0.layers.{layer}.self_attn", head) for layer in range(2) for head in range(2)
    ]
    assert all(set(row.values) == set(heads[0].values) for row in heads)


def test_what_was_not_measured_is_said():
    model = model_of()
    assert diagnose(model, torch.randn(2, 5, 16)).unseen == (
        "gradients and updates: the model returned no loss; give loss=",
    )
    assert diagnose(model, torch.randn(2, 5, 16), loss=loss).unseen == (
        "updates: no optimizer was given; give optimizer=",
    )


def test_a_loss_that_is_no_scalar_is_refused_and_leaves_nothing():
    model = model_of().train()
    with pytest.raises(
        ValueError, match=r"expected loss\(model, batch\) to give a scalar tensor, got shape \(2, 5, 7\)"
    ):
        diagnose(model, torch.randn(2, 5, 16), loss=lambda model, batch: model(batch))
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_collapsed_heads_are_named():
    model = model_of()
    attention = model[0].layers[1].self_attn
    with torch.no_grad():
        attention.in_proj_weight[8:16] *= 300  # queries of head 1
        attention.in_proj_weight[24:32] *= 300  # keys of head 1
    report = diagnose(model, torch.randn(4, 6, 16))
    found = {verdict.quantity: verdict for verdict in report.verdicts}
    for quantity in ("attention_logit_max", "attention_entropy_share"):
        assert found[quantity].places == (("0.layers.1.self_attn", (1,)),)
    assert "0.layers.1.self_attn (head 1)" in found["attention_logit_max"].text
    assert report.tables["Attention heads"][0].head == 1
    assert report.tables["Attention heads"][0].layer == "0.layers.1.self_attn"


def test_non_finite_values_are_findings_of_their_own_and_come_first():
    verdicts = judge({"diag/rank_residual/b": 0.05, "diag/activation_rms/a": math.nan, "diag/dead_units/c": math.inf})
    assert [verdict.quantity for verdict in verdicts] == ["activation_rms", "dead_units", "rank_residual"]
    assert verdicts[0].text == "The activation rms is not a finite number in a."
    assert concern("activation_rms", math.nan) == 3


def test_places_with_the_same_finding_share_a_verdict():
    values = {f"diag/update_ratio/layers.{number}": 0.05 + number / 1000 for number in range(5)}
    (verdict,) = judge(values)
    assert verdict.text == (
        "One step changes the weights by 0.054 of their size in layers.0, layers.1, layers.2 and 2 more layers."
    )
    assert len(verdict.places) == 5


def test_every_rule_says_where_its_threshold_comes_from():
    assert all(rule.source and "{where}" in rule.found for rule in RULES)


def test_the_three_forms_say_the_same(tmp_path):
    report = Diagnosis({"diag/attention_logit_max/<b>&/1": 2e4, "diag/rank_residual/x": math.nan}, ("y: <i>no</i>",))
    whole = json.loads(report.to_json())
    assert whole["values"] == {"diag/attention_logit_max/<b>&/1": 2e4, "diag/rank_residual/x": "NaN"}
    assert [verdict["level"] for verdict in whole["verdicts"]] == ["bad", "bad"]
    text = report.to_text()
    assert "Attention logits reach 20,000 in <b>& (head 1)." in text
    assert "not measured: y: <i>no</i>" in text
    page = report.to_html(title="<script>")
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
    assert "<i>" not in page
    assert "Attention logits reach 20,000" in page


def test_a_long_table_says_what_it_leaves_out():
    report = Diagnosis({f"diag/rank_residual/layer.{number}": 0.5 for number in range(9)})
    assert "3 more rows" in report.to_text(rows=6)


def test_a_hugging_face_model_gives_its_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    report = diagnose(model, {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 1])})
    assert report.unseen == ("updates: no optimizer was given; give optimizer=",)
    assert "diag/grad_norm/classifier" in report.values
    assert "diag/amplification_gradient/output" in report.values
