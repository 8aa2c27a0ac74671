import time

import torch

from tameformer.training.precision import candidates, fastest


def sleeper(seconds):
    return lambda name: time.sleep(seconds[name])


def test_the_clearly_fastest_is_taken():
    name, ratios = fastest(["fp32", "bf16"], sleeper({"fp32": 0.02, "bf16": 0.01}))
    assert name == "bf16"
    assert ratios["fp32"] == 1.0
    assert 0.4 < ratios["bf16"] < 0.7


def test_the_first_name_wins_a_near_tie():
    assert fastest(["fp32", "bf16"], sleeper({"fp32": 0.02, "bf16": 0.0195}))[0] == "fp32"


def test_a_single_candidate_is_not_timed():
    def never(name):
        raise AssertionError("was run")

    assert fastest(["fp32"], never) == ("fp32", {})


def test_full_precision_is_always_a_candidate_on_a_cpu():
    assert candidates(torch.device("cpu"))[0] == "fp32"
