import pytest
import torch

from tameformer.recipes.launch import train
from tameformer.training import Listener


class Asks(Listener):
    def __init__(self):
        self.answers = set()

    def on_log(self, step, values):
        self.answers.add(torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_takes_deterministic_kernels_where_it_is_told_to_and_leaves_torch_as_it_was(wanted, tmp_path):
    asks = Asks()
    values = {"max_steps": 2, "model.dim": 16, "model.num_layers": 1, "deterministic": wanted, "loop.logging_steps": 1}
    train("vit-digits", overrides={**values, "output_dir": str(tmp_path / "run")}, listeners=[asks])
    assert asks.answers == {wanted}
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
