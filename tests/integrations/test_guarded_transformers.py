import json
import math

import pytest
import torch
from torch import nn

from callbacks import events
from tameformer.errors import DivergedError
from tameformer.health import GuardConfig

transformers = pytest.importorskip("transformers")

from tameformer.integrations.transformers import TameCallback, loss_of  # noqa: E402

BATCH = 4


class Images(torch.utils.data.IterableDataset):
    """Batches of images in a fixed order; those in `spoilt` hold a NaN, those in `left_out` never come."""

    def __init__(self, spoilt=(), left_out=(), batches=12):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(batches, BATCH, 1, 8, 8, generator=generator)
        self.labels = torch.randint(3, (batches, BATCH), generator=generator)
        for number in spoilt:
            self.images[number - 1, 1, 0, 0, 0] = math.nan
        self.numbers = [number for number in range(batches) if number + 1 not in left_out]

    def __iter__(self):
        for number in self.numbers:
            for pixels, label in zip(self.images[number], self.labels[number], strict=True):
                yield {"pixel_values": pixels, "labels": label}


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)
    return transformers.ViTForImageClassification(config)


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **given):
        control.should_training_stop = state.global_step == self.step


def trainer(folder, data, callbacks=(), model=None, **options):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **{**settings, **options})
    built = transformers.Trainer(model or vit(), arguments, train_dataset=data, callbacks=list(callbacks))
    built.remove_callback(transformers.PrinterCallback)
    return built


def guarded(**options):
    return TameCallback(guard=GuardConfig(**options), probes=[])


def assert_same(one, other):
    """Weights, moments, bias-correction counts and place in the schedule, to the bit."""
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
    states = [each.optimizer.state_dict() for each in (one, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, moments in states[0]["state"].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["state"][number][key])), key
    assert one.lr_scheduler.state_dict() == other.lr_scheduler.state_dict()


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor"])
def test_a_refused_step_is_as_if_its_batch_had_never_come(optim, tmp_path):
    without = trainer(tmp_path / "without", Images(left_out=[1, 3]), [StopAt(4)], optim=optim)
    without.train()
    training = trainer(tmp_path / "guarded", Images(spoilt=[1, 3]), [guarded()], optim=optim)
    training.train()
    assert training.state.global_step == 6  # the Trainer counts what it believes to have done
    assert all(value.isfinite().all() for value in training.model.state_dict().values())
    assert_same(training, without)
    assert [event["step"] for event in events(tmp_path / "guarded")] == [1, 3]
    assert "the loss is nan" in events(tmp_path / "guarded")[0]["message"]


def test_without_the_guard_the_same_batch_ends_every_weight(tmp_path):
    training = trainer(tmp_path, Images(spoilt=[3]), [TameCallback(probes=[])])
    training.train()
    assert not any(value.isfinite().all() for value in training.model.parameters())


def test_a_guard_that_refuses_nothing_changes_nothing(tmp_path):
    plain, watched = trainer(tmp_path / "plain", Images()), trainer(tmp_path / "guarded", Images(), [guarded()])
    plain.train()
    watched.train()
    assert_same(plain, watched)
    assert plain.state.log_history[0]["grad_norm"] == watched.state.log_history[0]["grad_norm"]
    assert not watched.model._forward_hooks
    assert not watched.optimizer.optimizer._optimizer_step_pre_hooks


class InfiniteGradient(transformers.TrainerCallback):
    """One entry of one gradient at a step; the loss is in order."""

    def __init__(self, step):
        self.step = step

    def on_train_begin(self, args, state, control, model=None, **given):
        def spoil(gradient):
            if state.global_step + 1 != self.step:
                return gradient
            gradient = gradient.clone()
            gradient.view(-1)[0] = math.inf
            return gradient

        model.classifier.weight.register_hook(spoil)


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_an_infinite_gradient_is_refused_and_its_place_named(max_grad_norm, tmp_path):
    without = trainer(tmp_path / "without", Images(left_out=[2]), [StopAt(5)], max_grad_norm=max_grad_norm)
    without.train()
    options = {"max_grad_norm": max_grad_norm}
    training = trainer(tmp_path / "guarded", Images(), [InfiniteGradient(2), guarded()], **options)
    training.train()
    assert_same(training, without)
    (event,) = events(tmp_path / "guarded")
    assert event["quantity"] == "grad_norm"
    if max_grad_norm:  # with 0 the Trainer scales by infinity over infinity, and every gradient is NaN
        assert "from the gradient of classifier.weight." in event["message"]


def test_a_loss_spike_is_refused_also_where_gradients_are_clipped(tmp_path):
    class Spike(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = vit(), 0

        def forward(self, pixel_values, labels):
            self.calls += 1
            found = self.inner(pixel_values=pixel_values, labels=labels)
            return {"loss": found.loss * (1000.0 if self.calls == 10 else 1.0), "logits": found.logits}

    callback = guarded(window=16, min_values=4)
    training = trainer(tmp_path, Images(), [callback], Spike(), max_steps=12)
    training.train()
    (event,) = events(tmp_path)
    assert event["step"] == 10
    assert event["loss"] > 500
    assert event["grad_norm"] < 1.1  # it was clipped before anybody could look


@pytest.mark.parametrize("told", [True, False])
def test_accumulated_losses_are_the_loss_of_the_step(told, tmp_path):
    """Each of two micro-batches gives its share where the Trainer tells the model how many targets there are in all."""
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, pixel_values, labels, **kwargs):
            loss = self.inner(pixel_values=pixel_values, labels=labels).loss
            if "num_items_in_batch" in kwargs:
                loss = loss * BATCH / kwargs["num_items_in_batch"]
            return {"loss": loss}

    class Untold(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def forward(self, pixel_values, labels):
            return self.model(pixel_values, labels)

    callback = guarded()
    training = trainer(
        tmp_path, Images(), [callback], Model() if told else Untold(), gradient_accumulation_steps=2, max_steps=2
    )

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            seen.append(callback.guarded.state()["policy"]["loss"]["values"][-1])

    training.add_callback(Look())
    training.train()
    assert seen == pytest.approx([line["loss"] for line in training.state.log_history if "loss" in line], abs=1e-4)


def test_too_many_refused_steps_end_training_with_sound_weights(tmp_path):
    training = trainer(tmp_path, Images(spoilt=range(3, 9)), [guarded(max_skips=2)], max_steps=12)
    with pytest.raises(DivergedError, match=r"3 of the last 3 steps could not be taken.*checkpoint of step"):
        training.train()
    assert training.state.global_step == 4
    assert all(value.isfinite().all() for value in training.model.state_dict().values())
    assert not training.model._forward_hooks
    assert "DivergedError" in events(tmp_path, "stop")[-1]["message"]
    assert len(events(tmp_path, "diverged")) == 1
    assert not events(tmp_path, "rollback")  # nobody can
    assert len(events(tmp_path)) == 2


def test_a_resumed_run_remembers_what_is_usual_and_what_was_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 6, "max_steps": 10}
    trainer(tmp_path / "first", Images(spoilt=[5]), [guarded(max_skips=1), StopAt(6)], **saving).train()
    resumed = trainer(tmp_path / "first", Images(spoilt=[5, 8]), [guarded(max_skips=1)], **saving)
    with pytest.raises(DivergedError, match="2 of the last 4 steps"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-6"))
    assert [event["step"] for event in events(tmp_path / "first")] == [5]
    # A run that began without a guard gets one when it goes on.
    trainer(tmp_path / "second", Images(), [TameCallback(probes=[]), StopAt(6)], **saving).train()
    trainer(tmp_path / "second", Images(spoilt=[8]), [guarded()], **saving).train(
        resume_from_checkpoint=str(tmp_path / "second/checkpoint-6")
    )
    assert [event["step"] for event in events(tmp_path / "second")] == [8]


def test_default_probes_measure_a_refused_step(tmp_path):
    callback = TameCallback(every=1, guard=GuardConfig())
    trainer(tmp_path, Images(spoilt=[2]), [callback], max_steps=3).train()
    lines = [json.loads(line) for line in (tmp_path / "tame/probes.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    ratios = [[value for key, value in line.items() if "update_ratio" in key] for line in lines]
    assert set(ratios[1]) == {0.0}
    assert min(ratios[2]) > 0


def test_what_leaves_no_step_to_refuse_is_said_before_training(tmp_path):
    training = trainer(tmp_path, Images(), [guarded()])
    training.args.fp16 = True
    with pytest.raises(ValueError, match="guard needs fp32 or bf16, got fp16"):
        training.train()
    assert not (tmp_path / "tame").exists()


def test_a_loss_is_only_taken_from_where_one_is():
    assert loss_of(torch.ones(3)) is None
    assert loss_of({"logits": torch.ones(3)}) is None
    assert loss_of((torch.ones(()), torch.ones(3))) == 1
