from typing import Any

import pytest
import torch

from tameformer.cli.__main__ import main
from tameformer.errors import DeterminismError
from tameformer.recipes import vision
from tameformer.recipes.launch import train
from tameformer.training import Listener
from tameformer.training.deterministic import deterministic_kernels


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
    memory: Any = torch.utils.deterministic
    assert memory.fill_uninitialized_memory


def without_a_kernel(model, batch, **settings):
    return model(batch["images"]).sum().reshape(1).put_(torch.tensor([0]), torch.ones(1)).sum()


def test_the_command_line_names_an_operation_without_such_a_kernel_and_the_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vision, "classification_loss", without_a_kernel)
    arguments = ["train", "vit-digits", "--max_steps=1", "--optim.warmup_steps=0", "--model.dim=16"]
    assert main([*arguments, "--deterministic=true", f"--output_dir={tmp_path / 'run'}"]) == 1
    assert "torch has none for put_ on this device; drop --deterministic" in capsys.readouterr().err
    assert not torch.are_deterministic_algorithms_enabled()


def test_other_errors_inside_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), deterministic_kernels(True):
        raise RuntimeError("something else")
    with pytest.raises(DeterminismError, match="put_"), deterministic_kernels(True):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
