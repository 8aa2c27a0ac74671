"""What `--inject` promises, kind by kind and place by place: the outcome, the exit code, and the weights afterwards.

| fault | at step 1, in the middle | in evaluation | during a save |
|---|---|---|---|
| nan, inf-grad, bad-batch | the step is skipped, exit 0 | nan: told as NaN, exit 0 | |
| spike | skipped once the window is known, exit 0 | | |
| many of them | back to a checkpoint, exit 0; without a way back, exit 3 | | |
| oom | the batch is repeated in parts, exit 0 (test_out_of_memory.py) | | |
| term | saved, exit 143 | saved, exit 143 | saved, exit 143 |
| kill | resumes to the same bits | resumes to the same bits | resumes to the same bits |
| hang | told, exit 124; resumes to the same bits | the same | the same |
| enospc, eio | | | told, the older checkpoint stays, exit 0 |
| corrupt@latest | named by the resume, which takes the older one, to the same bits | | |

On one of two processes: test_two_processes.py.
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tameformer.cli.__main__ import main
from tameformer.recipes import launch
from tameformer.record import RunReader
from tameformer.training import CheckpointFolder, Listener

STEPS = 40
SMALL = {
    "max_steps": STEPS,
    "data.batch_size": 96,
    "model.dim": 16,
    "model.num_layers": 1,
    "loop.logging_steps": 1,  # every probe that is due at lines of the log watches the refused steps, too
    "loop.eval_steps": 20,
    "checkpoint.every": 5,
    "guard.min_values": 8,
    "optim.ema_decay": 0.9,
}
WORDS = [f"--{key}={value}" for key, value in SMALL.items()]


def run(folder, inject="", **options):
    overrides = {**SMALL, **options.pop("overrides", {}), "output_dir": str(folder)}
    with pytest.MonkeyPatch.context() as patch:  # drawing the page takes longer than the run
        patch.setattr(launch.report, "write_report", lambda folder: None)
        return launch.train("vit-digits", overrides=overrides, inject=inject, **options)


def kinds(folder) -> list[str]:
    unremarkable = ("start", "precision", "checkpoint", "finish", "injected", "resume", "stop", "verdict")
    return [event["kind"] for event in RunReader(folder).events() if event["kind"] not in unremarkable]


def files_of(folder, step=STEPS) -> dict[str, dict[str, torch.Tensor]]:
    path = CheckpointFolder(folder).path(step)
    return {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "average")}


def lines_of(folder) -> list[dict]:
    return [
        {key: value for key, value in line.items() if not key.startswith("perf/")} for line in RunReader(folder).log()
    ]


def same(a, b) -> bool:
    return all(a[name].keys() == b[name].keys() for name in a) and all(
        torch.equal(tensor, b[name][key]) for name in a for key, tensor in a[name].items()
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    run(folder)
    assert kinds(folder) == []
    return folder


@pytest.mark.parametrize("kind", ["nan", "inf-grad", "bad-batch", "spike"])
@pytest.mark.parametrize("step", [1, 17])
def test_a_bad_batch_is_skipped(clean, tmp_path, kind, step):
    result = run(tmp_path, f"{kind}@{step}")
    assert result.finished
    told = kind != "spike" or step > 8  # a spike in the first steps cannot be told from a start
    assert kinds(tmp_path) == (["step_skipped"] if told else [])
    files = files_of(tmp_path)
    assert all(bool(tensor.isfinite().all()) for part in files.values() for tensor in part.values())
    if told:
        counts = {float(value) for key, value in files["optimizer"].items() if key.endswith("/step")}
        assert counts == {STEPS - 1}  # the bias correction did not advance
        assert files["average"]["n_averaged"] == STEPS - 1  # nor did the moving average take the same weights twice
        assert next(line for line in lines_of(tmp_path) if line["step"] == step)["train/skipped"] == 1
    losses = [RunReader(folder).log()[-1]["eval/loss"] for folder in (clean, tmp_path)]
    assert abs(losses[0] - losses[1]) < 0.1


def test_a_fault_in_the_last_step_leaves_the_weights_before_it(clean, tmp_path):
    assert run(tmp_path / "a", f"nan@{STEPS}").finished
    run(tmp_path / "b", f"inf-grad@{STEPS}")
    assert kinds(tmp_path / "a") == kinds(tmp_path / "b") == ["step_skipped"]
    assert same(files_of(tmp_path / "a"), files_of(tmp_path / "b"))  # twice the run without that step
    assert not same(files_of(tmp_path / "a"), files_of(clean))


def test_the_schedule_stands_still_for_a_skipped_step(clean, tmp_path):
    run(tmp_path, "nan@17")
    rates, usual = ([line["train/lr"] for line in lines_of(f) if "train/lr" in line] for f in (tmp_path, clean))
    assert rates[:17] == usual[:17]
    assert rates[17:] == usual[16:-1]


def test_many_bad_batches_lead_back_to_a_checkpoint(clean, tmp_path):
    result = run(tmp_path, "nan@23-31")
    assert result.finished
    assert kinds(tmp_path) == ["step_skipped"] * 8 + ["rollback"]
    back = next(event for event in RunReader(tmp_path).events() if event["kind"] == "rollback")
    assert back["to_step"] == 10  # 15 and 20 were not followed by ten healthy steps
    assert back["since"] == 23
    steps = [line["step"] for line in lines_of(tmp_path) if "train/lr" in line]
    assert steps == list(range(1, STEPS + 1))  # no step is logged twice
    line = next(line for line in lines_of(tmp_path) if line["step"] == 11)
    assert line["epoch"] == pytest.approx(32 / 14)  # the data go on behind the bad window
    rates = {line["step"]: line["train/lr"] for line in lines_of(tmp_path) if "train/lr" in line}
    usual = {line["step"]: line["train/lr"] for line in lines_of(clean) if "train/lr" in line}
    assert rates[11] == usual[11] * 0.5
    assert abs(result.metrics["eval/loss"] - RunReader(clean).log()[-1]["eval/loss"]) < 0.3


@pytest.fixture(scope="module")
def gone_back(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(folder, "nan@23-31")
    return folder


@pytest.mark.parametrize("stop_at", [21, 26, 30])
def test_stopped_around_a_rollback_equals_never_stopped(gone_back, tmp_path, stop_at):
    """Before the trouble, within it, and just before going back: the same skips, checkpoint, data and rate follow."""
    faults = f"nan@23-31,term@{stop_at}"
    assert run(tmp_path, faults).exit_code == 143
    assert run(tmp_path, faults, resume="auto").finished
    assert same(files_of(tmp_path), files_of(gone_back))
    assert lines_of(tmp_path) == lines_of(gone_back)


PLACES = ("1", "17", "eval", "save")
ROLLBACK = [f"--inject=nan@23-31,kill@{batch}" for batch in (27, 33)]
KILLED = {
    **{f"kill@{place}": [[f"--inject=kill@{place}"], ["--resume=auto"]] for place in PLACES},
    **{
        f"hang@{place}": [
            [f"--inject=hang@{place}", "--loop.hang_timeout=3"],
            ["--resume=auto", "--loop.hang_timeout=90"],
        ]
        for place in PLACES
    },
    **{words: [[words], [words, "--resume=auto"]] for words in ROLLBACK},
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("killed")
    cases = {name: [[*WORDS, *words] for words in commands] for name, commands in KILLED.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    answer = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed.py"), folder / "cases.json", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return folder, json.loads(answer.stdout)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", KILLED)
def test_what_ends_a_process_loses_nothing(name, killed, clean, gone_back):
    folder, codes = killed
    first, second = codes[name]
    assert first == (124 if name.startswith("hang") else -signal.SIGKILL)
    assert second == 0, (folder / f"{name}.txt").read_text()
    straight = gone_back if name in ROLLBACK else clean
    assert same(files_of(folder / name), files_of(straight))
    assert lines_of(folder / name) == lines_of(straight)
    assert (folder / name / "hang-rank0.txt").is_file() == name.startswith("hang")


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_loses_nothing(clean, tmp_path, place):
    assert run(tmp_path, f"term@{place}").exit_code == 143
    assert run(tmp_path, f"term@{place}", resume="auto").finished
    assert same(files_of(tmp_path), files_of(clean))
    assert lines_of(tmp_path) == lines_of(clean)


@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_a_save_that_fails_is_told_and_the_run_goes_on(clean, tmp_path, kind):
    assert run(tmp_path, f"{kind}@save,term@7").exit_code == 143
    assert kinds(tmp_path) == ["checkpoint_failed"]
    assert CheckpointFolder(tmp_path).steps() == [7]  # that of step 5 failed; the one of the signal did not
    assert list((tmp_path / "checkpoints").glob(".*")) == []
    assert run(tmp_path, f"{kind}@save", resume="auto").finished  # it strikes at the first save of each command
    assert CheckpointFolder(tmp_path).steps()[-2:] == [35, 40]
    assert same(files_of(tmp_path), files_of(clean))


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(clean, tmp_path):
    assert run(tmp_path, "term@23").exit_code == 143
    assert run(tmp_path, "corrupt@latest", resume="auto").finished
    told = {event["kind"]: event for event in RunReader(tmp_path).events()}
    assert told["checkpoint_skipped"]["message"].startswith("step-000023 is damaged: model.safetensors differs")
    assert told["resume"]["message"] == "continues from step-000020"
    assert same(files_of(tmp_path), files_of(clean))
    assert lines_of(tmp_path) == lines_of(clean)
    run(tmp_path, "corrupt@latest", resume="auto")  # once in the life of a run folder
    assert CheckpointFolder(tmp_path).newest_verified() == (CheckpointFolder(tmp_path).path(STEPS), [])


def test_without_a_way_back_the_run_ends_with_three(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *WORDS, "--output_dir=run", "--inject=nan@23-40", "--guard.max_rollbacks=0"]) == 3
    told = capsys.readouterr().err
    assert "9 of the last 9 steps could not be taken, last step 31: the loss is nan" in told
    assert "the last checkpoint before it is untouched" in told
    assert RunReader(Path("run")).events()[-1]["kind"] == "diverged"
    assert "Diverged at step 31" in Path("run/report.html").read_text()
    found, skipped = CheckpointFolder(Path("run")).newest_verified()
    assert found is not None
    assert skipped == []
    assert main(["train", *WORDS, "--output_dir=early", "--inject=nan@1-40", "--checkpoint.every=20"]) == 3
    assert "there is no checkpoint" in capsys.readouterr().err


def test_a_run_whose_last_steps_fail_goes_back_before_it_ends(tmp_path):
    assert run(tmp_path, "nan@38-40").finished
    assert kinds(tmp_path) == ["step_skipped"] * 3 + ["rollback"]
    lines = [line for line in lines_of(tmp_path) if "train/loss" in line]
    assert lines[-1]["step"] == STEPS


def test_a_bounded_number_of_ways_back(tmp_path):
    with pytest.raises(Exception, match="The run ends; the last checkpoint before it is untouched"):
        run(tmp_path, "nan@23-400")
    assert kinds(tmp_path).count("rollback") == 3
    assert kinds(tmp_path)[-1] == "diverged"


def test_an_evaluation_that_is_not_finite_is_told_and_the_run_goes_on(clean, tmp_path):
    overrides = {"checkpoint.best_metric": "eval/loss"}
    assert run(tmp_path, "nan@eval", overrides=overrides).finished
    first, last = (line for line in lines_of(tmp_path) if "eval/loss" in line)
    assert math.isnan(first["eval/loss"])
    assert last == lines_of(clean)[-1]
    assert (tmp_path / "BEST").read_text().strip() == "step-000040"


def test_a_checkpoint_never_holds_what_is_not_finite(tmp_path):
    """Weights that broke in an update, which no loss has shown yet: not kept, and the run goes back."""

    class Break(Listener):
        def on_log(self, step, values):
            if step == 25 and not self.done:
                self.done = True
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] = math.nan

        done, model = False, None

    breaking = Break()
    real = launch.Loop

    class Loop(real):  # hands the listener the model: nothing else reaches the weights from outside
        def __init__(self, run, *rest):
            breaking.model = run.model
            super().__init__(run, *rest)

    launch.Loop = Loop
    try:
        assert run(tmp_path, listeners=[breaking]).finished
    finally:
        launch.Loop = real
    found = kinds(tmp_path)
    assert found[0] == "checkpoint_failed"
    assert found[-1] == "rollback"
    assert all(bool(tensor.isfinite().all()) for part in files_of(tmp_path).values() for tensor in part.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nana@3", "--inject nana@3: expected KIND@BATCH"),
        ("spike@save", "--inject spike@save: spike strikes at the number of a batch, got save"),
        ("nan@0", "batches count from 1"),
        ("nan@9-3", "a range goes upwards"),
        ("enospc@3", "enospc strikes at save, got 3"),
        ("corrupt@latest", "holds no checkpoint yet; train first, then --resume"),
        ("nan@3x5", "only a spike has a factor, remove x5"),
    ],
)
def test_faults_that_do_not_exist_are_refused(text, message, capsys, tmp_path):
    assert main(["train", f"--output_dir={tmp_path}/run", f"--inject={text}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
