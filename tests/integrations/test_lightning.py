import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from callbacks import Gradients, left_on, lines
from tameformer.errors import RecordError
from tameformer.models import DecoderConfig, decoder
from tameformer.probes import AttentionEntropy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Lightning imports is not ours
    L = pytest.importorskip("lightning.pytorch")
    older = pytest.importorskip("pytorch_lightning")

from tameformer.integrations.lightning import TameCallback, watched_module

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice about workers, loggers and progress bars


def tokens(count):
    return torch.randint(12, (count, 9), generator=torch.Generator().manual_seed(1))


def language_model(package):
    class LanguageModel(package.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = decoder(DecoderConfig(dim=16, num_layers=2, num_heads=2, dropout=0.1), vocab_size=12)
            self.losses, self.rates = [], []

        def loss(self, batch):
            return nn.functional.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def train_dataloader(self):
            return DataLoader(tokens(32), batch_size=4)

        def val_dataloader(self):
            return DataLoader(tokens(8), batch_size=8)

    return LanguageModel()


def trainer(folder, callbacks=(), package=L, **options):
    settings = {
        "max_steps": 6,
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    torch.manual_seed(3)
    return package.Trainer(callbacks=list(callbacks), **{**settings, **options})


def entropy_only(*args, every=1, **options):
    return TameCallback(*args, every=every, probes=[(AttentionEntropy(), every)], **options)


def assert_nothing_left(training, module):
    assert not left_on(module)
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in training.optimizers)
    assert torch.overrides._get_current_function_mode() is None


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("package", "accumulate"), [(L, 1), (L, 2), (older, 1)])
def test_watching_changes_nothing_and_leaves_nothing(package, accumulate, tmp_path):
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5, "val_check_interval": 4, "max_steps": 4}
    plain, watched = language_model(package), language_model(package)
    without = trainer(tmp_path / "plain", package=package, **options)
    without.fit(plain)
    random = torch.get_rng_state()
    training = trainer(tmp_path, [TameCallback(every=1)], package, **options)
    training.fit(watched)
    assert same(plain, watched)
    assert torch.equal(random, torch.get_rng_state())
    assert plain.losses == watched.losses
    assert without.callback_metrics == training.callback_metrics
    assert_nothing_left(training, watched)
    probes = lines(tmp_path / "tame", "probes.jsonl")
    assert [line["step"] for line in probes] == [1, 2, 3, 4]
    layer = "stack.layers.1.feed_forward.branch.up"
    assert {f"diag/grad_norm/{layer}", f"diag/update_ratio/{layer}"} <= probes[0].keys()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_log_holds_loss_gradient_rate_and_validation(accumulate, tmp_path):
    module = language_model(L)
    callback = TameCallback(every=2, probes=[(AttentionEntropy(), 3)])
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": 4 * accumulate, "max_steps": 4}
    training = trainer(tmp_path, [callback], **options)
    training.fit(module)
    log = [line for line in lines(tmp_path / "tame") if "train/loss" in line]
    assert [line["step"] for line in log] == [2, 4]
    ends = [2 * accumulate, 4 * accumulate]
    losses = [sum(module.losses[end - accumulate : end]) / accumulate for end in ends]
    assert [line["train/loss"] for line in log] == pytest.approx(losses)
    assert [line["train/lr"] for line in log] == pytest.approx([module.rates[end - 1] for end in ends])
    (evaluation,) = [line for line in lines(tmp_path / "tame") if "eval/loss" in line]
    assert evaluation == {"step": 4, "eval/loss": pytest.approx(training.callback_metrics["val_loss"].item())}
    (probed,) = lines(tmp_path / "tame", "probes.jsonl")
    assert probed["step"] == 3
    assert [event["kind"] for event in lines(tmp_path / "tame", "events.jsonl")] == ["start", "finish"]


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_gradients_are_measured_before_the_update_and_after_clipping(clip, tmp_path):
    module = language_model(L)
    probe = Gradients(list(module.parameters()))
    training = trainer(tmp_path, [TameCallback(every=1, probes=[(probe, 1)])], gradient_clip_val=clip, max_steps=2)
    training.fit(module)
    norms = [line["diag/gradients/all"] for line in lines(tmp_path / "tame", "probes.jsonl")]
    logged = [line["train/grad_norm"] for line in lines(tmp_path / "tame") if "train/grad_norm" in line]
    assert norms == pytest.approx(logged if clip is None else [clip, clip], rel=1e-3)
    assert min(logged) > 1e-2
    assert all(line["diag/moved/all"] > 0 for line in lines(tmp_path / "tame", "probes.jsonl"))


def two_parts():
    class TwoOptimizers(L.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization = False
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
            self.norms = []

        def forward(self, batch):
            return self.second(self.first(batch))

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            loss = self(batch).square().mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            self.norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in self.parameters())))
            if batch_idx % 2:
                for optimizer in optimizers:
                    optimizer.step()
            return loss

        def configure_optimizers(self):
            return [
                torch.optim.SGD(part.parameters(), lr=rate) for part, rate in ((self.first, 0.1), (self.second, 0.2))
            ]

        def train_dataloader(self):
            return DataLoader(torch.ones(16, 4), batch_size=2)

    return TwoOptimizers()


def test_several_optimizers_are_one_step(tmp_path):
    module = two_parts()
    probe = Gradients(list(module.parameters()))
    training = trainer(tmp_path, [TameCallback(every=1, probes=[(probe, 1)])], max_steps=-1, max_epochs=1)
    training.fit(module)
    assert training.global_step == 8  # Lightning counts both
    log = lines(tmp_path / "tame")
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert [line["train/grad_norm"] for line in log] == pytest.approx(module.norms[1::2])
    assert {line["train/lr"] for line in log} == {0.2}
    assert [line["step"] for line in lines(tmp_path / "tame", "probes.jsonl")] == [1, 2, 3, 4]
    assert_nothing_left(training, module)


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    def checkpoints(folder):
        return L.callbacks.ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename="{step}")

    trainer(tmp_path / "straight", [entropy_only(every=2)], max_steps=8).fit(language_model(L))
    folder = tmp_path / "broken"
    options = {"enable_checkpointing": True}
    trainer(folder, [entropy_only(every=2), checkpoints(folder)], max_steps=6, **options).fit(language_model(L))
    resumed = trainer(folder, [entropy_only(every=2), checkpoints(folder)], max_steps=8, **options)
    resumed.fit(language_model(L), ckpt_path=folder / "step=4.ckpt", weights_only=False)
    folders = [each / "tame" for each in (tmp_path / "straight", folder)]
    steps = [[line["step"] for line in lines(each) if "train/loss" in line] for each in folders]
    assert steps == [[2, 4, 6, 8], [2, 4, 6, 8]]
    probes = [[(line["step"], line.keys()) for line in lines(each, "probes.jsonl")] for each in folders]
    assert probes[0] == probes[1]
    assert [event["kind"] for event in lines(folders[1], "events.jsonl")] == ["start", "finish", "resume", "finish"]
    assert not (folder / "tame-2").exists()


def test_resuming_counts_steps_not_optimizers(tmp_path):
    checkpoint = L.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    options = {"max_steps": -1, "enable_checkpointing": True}
    trainer(tmp_path, [entropy_only(), checkpoint], max_epochs=1, **options).fit(two_parts())
    again = trainer(tmp_path, [entropy_only()], max_epochs=2, **options)
    again.fit(two_parts(), ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert [line["step"] for line in lines(tmp_path / "tame") if "train/loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_fitting_again_keeps_both_records_but_not_in_a_folder_that_was_named(tmp_path):
    for _ in range(2):
        trainer(tmp_path, [entropy_only()], max_steps=1).fit(language_model(L))
    assert {path.name for path in tmp_path.glob("tame*")} == {"tame", "tame-2"}
    module, named = language_model(L), tmp_path / "tame"
    with pytest.raises(RecordError, match="holds a run already"):
        trainer(tmp_path, [entropy_only(named)], max_steps=1).fit(module)
    assert not left_on(module)


def test_an_exception_leaves_nothing_and_is_told(tmp_path):
    class Fails(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                seen.append(left_on(pl_module))
                raise KeyError("broken")

    seen, module = [], language_model(L)
    training = trainer(tmp_path, [entropy_only(), Fails()])
    with pytest.raises(KeyError):
        training.fit(module)
    assert seen == [["model"]]  # else this test shows nothing
    assert_nothing_left(training, module)
    assert "KeyError" in lines(tmp_path / "tame", "events.jsonl")[-1]["message"]


def test_what_training_does_not_call_is_said_not_guessed(tmp_path):
    class CallsTheParts(type(two_parts())):
        def forward(self, batch):
            raise AssertionError

        def __call__(self, batch):
            return self.second(self.first(batch))

    trainer(tmp_path / "a", [entropy_only()], max_steps=2).fit(CallsTheParts())
    events = lines(tmp_path / "a/tame", "events.jsonl")
    assert ["no forward pass of CallsTheParts was seen" in each["message"] for each in events] == [False, True, False]
    trainer(tmp_path / "b", [entropy_only(model="first")], max_steps=2).fit(CallsTheParts())
    assert not any("no forward pass" in event["message"] for event in lines(tmp_path / "b/tame", "events.jsonl"))


def test_a_wrong_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"submodule of LanguageModel \(model\), got 'net'"):
        watched_module(language_model(L), "net")
