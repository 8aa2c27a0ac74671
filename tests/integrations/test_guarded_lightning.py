import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from callbacks import events
from tameformer.errors import DivergedError
from tameformer.health import GuardConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning imports is not ours
    L = pytest.importorskip("lightning.pytorch")

from tameformer.integrations.lightning import TameCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers, loggers and progress bars


def batches(spoilt=(), left_out=(), count=12):
    generator = torch.Generator().manual_seed(1)
    found = torch.rand(count, 4, 6, generator=generator)
    for number in spoilt:
        found[number - 1, 1, 0] = math.nan
    return [found[number] for number in range(count) if number + 1 not in left_out]


class Regression(L.LightningModule):
    """A module with running statistics, whose inputs are its targets."""

    def __init__(self, data, *, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 6))
        self.data, self.automatic_optimization = data, not manual

    def training_step(self, batch, batch_idx):
        loss = (self.model(batch) - batch).square().mean()
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=None)


def fitted(folder, module, callbacks=(), resume=None, **options):
    settings = {"max_steps": 6, "gradient_clip_val": 0.5, **options}
    if not module.automatic_optimization:
        del settings["gradient_clip_val"]
    training = L.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip
    training.fit(module, ckpt_path=resume, weights_only=False if resume else None)
    return training


def guarded(**options):
    return TameCallback(guard=GuardConfig(**options), probes=[])


def assert_same(one, other):
    """Weights, running statistics, moments, bias-correction counts and place in the schedule, to the bit."""
    for key, value in one.lightning_module.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, other.lightning_module.state_dict()[key]), key
    states = [each.optimizers[0].state_dict() for each in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, moments in states[0]["state"].items():
        for key, value in moments.items():
            assert torch.equal(value, states[1]["state"][number][key]), key
    schedules = [each.lr_scheduler_configs[0].scheduler.state_dict() for each in (one, other)]
    assert schedules[0] == schedules[1]


@pytest.mark.parametrize("manual", [False, True])
def test_a_refused_step_is_as_if_its_batch_had_never_come(manual, tmp_path):
    without = fitted(tmp_path / "without", Regression(batches(left_out=[1, 3]), manual=manual), max_steps=4)
    training = fitted(tmp_path / "guarded", Regression(batches(spoilt=[1, 3]), manual=manual), [guarded()])
    assert training.global_step == 6  # Lightning counts what it believes to have done
    assert_same(training, without)
    assert all(value.isfinite().all() for value in training.lightning_module.state_dict().values())
    assert [event["step"] for event in events(tmp_path / "guarded")] == [1, 3]


def test_without_the_guard_the_same_batch_ends_every_weight(tmp_path):
    training = fitted(tmp_path, Regression(batches(spoilt=[3])), [TameCallback(probes=[])])
    assert not any(value.isfinite().all() for value in training.lightning_module.parameters())


def test_a_guard_that_refuses_nothing_changes_nothing(tmp_path):
    training = fitted(tmp_path / "guarded", Regression(batches()), [guarded()])
    assert_same(training, fitted(tmp_path / "plain", Regression(batches())))


def test_an_infinite_gradient_in_one_of_two_accumulated_batches_is_refused_with_both(tmp_path):
    class Spoilt(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.fit_loop.batch_idx == 2:  # the first of the second step
                pl_module.model[3].weight.grad[0, 0] = math.inf

    options = {"accumulate_grad_batches": 2}
    without = fitted(tmp_path / "without", Regression(batches(left_out=[3, 4])), max_steps=3, **options)
    training = fitted(tmp_path / "guarded", Regression(batches()), [Spoilt(), guarded()], max_steps=4, **options)
    assert_same(training, without)
    (event,) = events(tmp_path / "guarded")
    assert (event["step"], event["grad_norm"]) == (2, "Infinity")
    assert "model.3.weight" in event["message"]


def test_a_spike_is_told_from_the_gradient_before_clipping(tmp_path):
    data = batches(count=20)
    data[15] = 1000 * data[15]
    fitted(tmp_path, Regression(data), [guarded(window=16, min_values=4)], max_steps=20)
    skipped = events(tmp_path)
    assert 16 in [event["step"] for event in skipped]
    assert max(event["grad_norm"] for event in skipped) > 100


def test_too_many_refused_steps_end_training_with_sound_weights(tmp_path):
    module = Regression(batches(spoilt=range(3, 9)))
    with pytest.raises(DivergedError, match="3 of the last 3 steps could not be taken"):
        fitted(tmp_path, module, [guarded(max_skips=2)], max_steps=12)
    assert all(value.isfinite().all() for value in module.state_dict().values())
    assert "DivergedError" in events(tmp_path, "stop")[-1]["message"]
    assert len(events(tmp_path, "diverged")) == 1
    assert not events(tmp_path, "rollback")  # nobody can


def test_a_resumed_run_remembers_what_was_refused(tmp_path):
    first = fitted(tmp_path, Regression(batches(spoilt=[5])), [guarded(max_skips=1)])
    first.save_checkpoint(tmp_path / "first.ckpt")
    # Lightning begins the data anew: the second batch is the eighth step's.
    with pytest.raises(DivergedError, match="2 of the last 4 steps"):
        fitted(tmp_path, Regression(batches(spoilt=[2])), [guarded(max_skips=1)], tmp_path / "first.ckpt", max_steps=10)


def test_several_optimizers_are_refused_before_training(tmp_path):
    class Two(Regression):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.model[number].parameters(), lr=0.1) for number in (0, 3)]

    with pytest.raises(ValueError, match="guard needs one optimizer, got 2"):
        fitted(tmp_path, Two(batches(), manual=True), [guarded()])
