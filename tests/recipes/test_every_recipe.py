"""Every recipe as it comes, on little data made here: it trains with a stabilizer on, and the probes see into its model."""

import math

import pytest

from tameformer.recipes import catalogue
from tameformer.recipes.examine import examine
from tameformer.recipes.launch import train
from tiny_recipes import SETTINGS, values_of, write_data

WEIGHTS = {"spectral_norm", "stable_rank", "grad_norm", "grad_rms_over_epsilon"}
ATTENTION = {"attention_entropy", "attention_entropy_bound", "attention_logit_max"}
STREAM = {"branch_share", "dead_units", "rank_residual", "activation_rms"}
HAS_NOT = {"graph": STREAM, "seq2seq-rnn": STREAM, "hierarchical": STREAM}
"""No residual branches there."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder)
    return folder


def test_no_recipe_is_left_out():
    assert set(SETTINGS) == set(catalogue.names())


@pytest.mark.parametrize("recipe", SETTINGS)
def test_it_trains_with_a_stabilizer_and_its_model_is_seen_into(recipe, data, tmp_path):
    values = {"max_steps": 3, "precision": "fp32", "optim.warmup_steps": 1, "loop.eval_steps": 3}
    values |= values_of(recipe, data)
    result = train(recipe, overrides={**values, "stabilize": ["sigma_reparam"], "output_dir": str(tmp_path / "run")})
    assert result.step == 3
    assert math.isfinite(result.metrics["eval/loss"])
    diagnosis, step = examine(tmp_path / "run")
    assert step == 3
    seen = {key.split("/")[1] for key in diagnosis.values}
    assert seen & (WEIGHTS | ATTENTION | STREAM) == (WEIGHTS | ATTENTION | STREAM) - HAS_NOT.get(recipe, set())
    assert all(math.isfinite(value) for value in diagnosis.values.values())
