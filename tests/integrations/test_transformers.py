import math

import pytest
import torch

from callbacks import Gradients, left_on, lines
from tameformer.errors import RecordError
from tameformer.probes import AttentionEntropy
from tameformer.record import RunReader

transformers = pytest.importorskip("transformers")

from tameformer.integrations.transformers import TameCallback  # noqa: E402

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=32, max_position_embeddings=16, num_labels=2, **SIZES)
    return transformers.BertForSequenceClassification(config)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def examples(model, count=32):
    tokens = torch.randint(32, (count, 8), generator=torch.Generator().manual_seed(1))
    labels = tokens if "GPT2" in type(model).__name__ else tokens[:, 0] % 2
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def trainer(model, folder, callbacks=(), **options):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder / "out"), **{**settings, **options})
    built = transformers.Trainer(
        model, arguments, train_dataset=examples(model), eval_dataset=examples(model, 16), callbacks=list(callbacks)
    )
    built.remove_callback(transformers.PrinterCallback)
    return built


def entropy_only(*args, every=1, **options):
    return TameCallback(*args, every=every, probes=[(AttentionEntropy(), every)], **options)


def assert_nothing_left(trainer):
    optimizer = trainer.optimizer.optimizer
    assert not left_on(trainer.model)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert torch.overrides._get_current_function_mode() is None


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("build", "accumulate"), [(bert, 1), (gpt2, 2)])
def test_watching_changes_nothing_and_leaves_nothing(build, accumulate, tmp_path):
    options = {"gradient_accumulation_steps": accumulate, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    plain = trainer(build(), tmp_path / "plain", **options)
    plain.train()
    random = torch.get_rng_state()
    watched = trainer(build(), tmp_path / "watched", [TameCallback(every=1)], **options)
    watched.train()
    assert same(plain.model, watched.model)
    assert torch.equal(random, torch.get_rng_state())
    for key in ("loss", "eval_loss", "grad_norm"):
        values = [[line[key] for line in each.state.log_history if key in line] for each in (plain, watched)]
        assert values[0] == values[1]
    assert_nothing_left(watched)
    assert [line["step"] for line in lines(tmp_path / "watched/out/tame", "probes.jsonl")] == [1, 2, 3, 4]


def test_the_log_holds_what_the_trainer_logs_at_its_steps(tmp_path):
    callback = TameCallback(every=3, probes=[(AttentionEntropy(), 2)])
    training = trainer(bert(), tmp_path, [callback], eval_strategy="steps", eval_steps=3)
    training.train()
    folder = tmp_path / "out/tame"
    history = [line for line in training.state.log_history if "loss" in line]
    log = lines(folder)
    losses = [line for line in log if "train/loss" in line]
    assert [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in losses] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in history
    ]
    assert [line["step"] for line in log if "perf/step_seconds" in line] == [3, 6]
    # The schedule is linear to zero: what the step was taken with, not what comes next.
    assert [line["train/lr"] for line in log if "train/lr" in line] == pytest.approx([1e-2 * 4 / 6, 1e-2 / 6])
    evaluations = [line for line in training.state.log_history if "eval_loss" in line]
    assert [(line["step"], line["eval/loss"]) for line in log if "eval/loss" in line] == [
        (line["step"], line["eval_loss"]) for line in evaluations
    ]
    probes = lines(folder, "probes.jsonl")
    assert [line["step"] for line in probes] == [2, 4, 6]
    layer = "bert.encoder.layer.1.attention.self"
    assert {f"diag/attention_entropy/{layer}/{head}" for head in (0, 1)} <= probes[0].keys()
    assert [event["kind"] for event in lines(folder, "events.jsonl")] == ["start", "finish"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_hooks_reach_the_optimizer_inside_the_wrapper(accumulate, tmp_path):
    model = bert()
    probe = Gradients(list(model.parameters()))
    training = trainer(
        model,
        tmp_path,
        [TameCallback(probes=[(probe, 1)])],
        gradient_accumulation_steps=accumulate,
        logging_steps=1,
        max_grad_norm=0.0,  # not clipped: the norm of the Trainer's log is the one that the optimizer gets
        max_steps=3,
    )
    training.train()
    probes = lines(tmp_path / "out/tame", "probes.jsonl")
    norms = [line["grad_norm"] for line in training.state.log_history if "grad_norm" in line]
    assert [line["diag/gradients/all"] for line in probes] == pytest.approx(norms)
    assert all(line["diag/moved/all"] > 0 for line in probes)


def test_the_loss_of_epochs_and_of_the_first_step_is_logged(tmp_path):
    trainer(bert(), tmp_path / "a", [entropy_only()], logging_strategy="epoch", max_steps=9).train()
    assert [line["step"] for line in lines(tmp_path / "a/out/tame") if "train/loss" in line] == [8, 9]
    trainer(bert(), tmp_path / "b", [entropy_only()], logging_first_step=True, max_steps=2).train()
    assert [line["step"] for line in lines(tmp_path / "b/out/tame") if "train/loss" in line] == [1, 2]


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    straight = trainer(gpt2(), tmp_path / "straight", [entropy_only(every=2)], max_steps=8)
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    trainer(gpt2(), tmp_path, [entropy_only(every=2), _StopAt(6)], **saving).train()
    resumed = trainer(gpt2(), tmp_path, [entropy_only(every=2)], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert same(straight.model, resumed.model)
    folders = [each / "out/tame" for each in (tmp_path / "straight", tmp_path)]
    logs = [[{k: v for k, v in line.items() if "seconds" not in k} for line in lines(each)] for each in folders]
    assert logs[0] == logs[1]
    probes = [[(line["step"], line.keys()) for line in lines(each, "probes.jsonl")] for each in folders]
    assert probes[0] == probes[1]
    assert [event["kind"] for event in lines(folders[1], "events.jsonl")] == ["start", "finish", "resume", "finish"]
    assert not (tmp_path / "out/tame-2").exists()


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **given):
        control.should_training_stop = state.global_step == self.step


def test_training_again_keeps_both_records_but_not_in_a_folder_that_was_named(tmp_path):
    for _ in range(2):
        trainer(bert(), tmp_path, [entropy_only()], max_steps=2).train()
    for name in ("tame", "tame-2"):
        assert RunReader(tmp_path / "out" / name).log()[-1]["step"] == 2
    for allowed in (True, False):
        training = trainer(bert(), tmp_path, [entropy_only(tmp_path / "mine")], max_steps=2)
        if allowed:
            training.train()
        else:
            with pytest.raises(RecordError, match="holds a run already"):
                training.train()
            assert not left_on(training.model)


class _Fails(transformers.TrainerCallback):
    """Breaks the second step while it is being measured, after the forward pass."""

    def on_pre_optimizer_step(self, args, state, control, **given):
        if state.global_step == 1:
            raise KeyError("broken")


def test_after_an_exception_closing_leaves_nothing(tmp_path):
    with entropy_only() as callback:
        training = trainer(bert(), tmp_path, [callback, _Fails()])
        with pytest.raises(KeyError):
            training.train()
        assert left_on(training.model)  # else this test shows nothing
        callback.close()
        assert_nothing_left(training)
    with pytest.raises(KeyError), entropy_only() as callback:  # noqa: PT012
        training = trainer(bert(), tmp_path, [callback, _Fails()])
        training.train()
    assert_nothing_left(training)
    assert lines(tmp_path / "out/tame-2", "events.jsonl")[-1]["kind"] == "stop"


def test_training_anew_after_an_exception_leaves_nothing_of_the_first(tmp_path):
    callback, failing = entropy_only(), _Fails()
    training = trainer(bert(), tmp_path, [callback, failing])
    with pytest.raises(KeyError):
        training.train()
    training.remove_callback(failing)
    training.train()
    assert_nothing_left(training)
    assert lines(tmp_path / "out/tame", "events.jsonl")[-1]["kind"] == "stop"
    assert lines(tmp_path / "out/tame-2", "events.jsonl")[-1]["kind"] == "finish"


def test_nothing_is_on_the_model_during_evaluation(tmp_path):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_prediction_step(self, args, state, control, model=None, **given):
            seen.append(left_on(model))

    callbacks = [entropy_only(), Look()]
    trainer(bert(), tmp_path, callbacks, eval_strategy="steps", eval_steps=1, max_steps=2).train()
    assert seen == [[], []]


def test_a_non_finite_gradient_is_written_as_such(tmp_path):
    model = bert()
    with torch.no_grad():
        model.classifier.bias[0] = math.nan
    trainer(model, tmp_path, [entropy_only()], max_steps=2, logging_nan_inf_filter=False).train()
    assert [line["train/loss"] for line in lines(tmp_path / "out/tame") if "train/loss" in line] == ["NaN"]
    assert [line["train/grad_norm"] for line in lines(tmp_path / "out/tame") if "train/grad_norm" in line] == ["NaN"]


def test_trackers_get_the_lines_of_the_log(tmp_path):
    told = []
    callback = entropy_only(every=2, trackers=[lambda step, values: told.append((step, sorted(values)))])
    trainer(bert(), tmp_path, [callback], max_steps=2).train()
    assert told == [(line.pop("step"), sorted(line)) for line in lines(tmp_path / "out/tame")]
