"""Rates follow the batch: in proportion for SGD, by the square root for Adam's family."""

import pytest

from tameformer import train
from tameformer.errors import ConfigError
from tameformer.optim import OptimConfig, for_batch_size
from tameformer.record import RunReader
from tiny_recipes import write_data

SHORT = {"max_steps": 2, "model.dim": 16, "model.num_layers": 1, "optim.schedule": "constant", "optim.warmup_steps": 0}


@pytest.mark.parametrize(
    ("name", "factor"),
    [("sgd", 4), ("lars", 4), ("adamw", 2), ("adam", 2), ("radam", 2), ("stable_adamw", 2), ("muon", 2)],
)
def test_four_times_the_batch(name, factor):
    config = OptimConfig(name=name, peak_lr=0.01, base_batch_size=32)
    found = for_batch_size(config, 128)
    assert found.peak_lr == pytest.approx(0.01 * factor)
    assert for_batch_size(config, 32).peak_lr == 0.01
    assert for_batch_size(found, 999) == found


def test_the_rate_of_adamw_beside_muon_is_scaled_too():
    config = OptimConfig(name="muon", peak_lr=0.02, adamw_lr=0.001, base_batch_size=32)
    assert for_batch_size(config, 8).adamw_lr == pytest.approx(0.0005)


def test_a_run_takes_the_scaled_rate_and_says_so(tmp_path):
    settings = {"optim.peak_lr": 1e-3, "optim.base_batch_size": 16, "data.batch_size": 64, "loop.logging_steps": 1}
    train("vit-digits", overrides={**SHORT, **settings, "output_dir": str(tmp_path)})
    run = RunReader(tmp_path)
    assert [line["train/lr"] for line in run.log() if "train/lr" in line] == pytest.approx([2e-3, 2e-3])
    (event,) = (event for event in run.events() if event["kind"] == "learning_rate")
    assert event["message"] == "peak learning rate 0.002, scaled to the batch size"


def test_without_batches_it_is_refused(tmp_path):
    write_data(tmp_path)
    data = str(tmp_path / "graph.npz")
    with pytest.raises(ConfigError, match=r"data\.batch_size, which this recipe does not have"):
        train("graph", overrides={"optim.base_batch_size": 8, "data.path": data, "output_dir": str(tmp_path / "run")})


def test_a_size_below_one_is_refused():
    with pytest.raises(ValueError, match="base_batch_size must be at least 1, got 0"):
        OptimConfig(base_batch_size=0)
